"""Converted models: the same bits as quantising when loading, for every split; whole or no model at all."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.convert import UNFINISHED, convert
from glm.converted import MANIFEST, ConvertedCheckpoint
from glm.ends import Embedding, Head, end_placement
from glm.errors import CheckpointError, ConversionError, DiskSpaceError, GlmError, ManifestError, ShardError
from glm.model import LayerStack, Model
from glm.model_source import MadeFor, made_for, open_checkpoint
from glm.positions import prompt_layout
from glm.precision import Precision
from glm.tokenizer import load_tokenizer
from tests.tiny_checkpoints import CAUSAL, FAMILIES, NATIVE, PREFIX, write_checkpoint
from tests.tiny_tokenizers import train_chatglm2

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PROMPTS = {"chatglm": [5, 6, 30, 91, 94, 7], "chatglm2": [5, 6, 7], "glm": [5, 6, 7, 8], "glm4": [5, 6, 7, 8]}
KEYS = {
    **FAMILIES,
    "published int8": {**CAUSAL, "quantization_bit": 8},
    "published int4": {**PREFIX, "quantization_bit": 4, "quantization_embeddings": True},
    "tied": {**NATIVE, "tie_word_embeddings": True},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "source")
    return tmp_path / "source"


def outputs(model_dir: Path, precision: Precision, cuts: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Every layer's output and the logits for a prompt, through stages between the cuts; lm_head quantised too."""
    config, checkpoint = load_config(model_dir), open_checkpoint(model_dir)
    ends, head = (end_placement(p, CPU, config) for p in (Precision.FP32, precision))
    ids, found = PROMPTS[config.family], []
    hidden = Embedding.load(checkpoint, config, ends).forward(torch.tensor(ids))
    bounds = (0, *cuts, config.num_layers)
    for start, end in pairwise(bounds):
        stack = LayerStack.load(checkpoint, config, start, end, precision, CPU)
        segment = Segment(stack.new_cache(), 0, len(ids), prompt_layout(ids, config))
        hidden = stack.forward(hidden, [segment], lambda _, output: found.append(output.clone()))
    return [*found, Head.load(checkpoint, config, ends, head).forward(hidden)]


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
@pytest.mark.parametrize("kind", KEYS)
def test_a_converted_model_computes_the_same_bits(tmp_path: Path, kind: str, precision: Precision) -> None:
    """Every family, published quantised ones and tied ends too, undivided and for every cut in two."""
    source, out = tmp_path / "source", tmp_path / "out"
    config = write_checkpoint(source, KEYS[kind], num_shards=2, suffix="safetensors" if kind == "glm" else "bin")
    convert(source, out, precision, precision)
    wanted = outputs(source, precision)
    for cut in range(config.num_layers):
        assert_equal(outputs(out, precision, (cut,) if cut else ()), wanted)
    ConvertedCheckpoint(out).check()


def test_other_precisions_can_be_asked_of_it(source: Path, tmp_path: Path) -> None:
    """A float precision, or another integer one, works on the integers that are there."""
    convert(source, tmp_path / "out", Precision.INT8, Precision.INT8)
    wanted = outputs(source, Precision.INT8)[-1]
    for precision in (Precision.FP32, Precision.INT4):
        found = outputs(tmp_path / "out", precision)[-1]
        assert float((found - wanted).norm() / wanted.norm()) < 0.3


def test_the_directory_is_a_whole_model(source: Path, tmp_path: Path) -> None:
    """Tokenizer, config and licence come along; the source can go; nothing else is there; the manifest says it all."""
    write_checkpoint(source, {**CAUSAL, "padded_vocab_size": 1024})
    train_chatglm2(source)
    (source / "MODEL_LICENSE").write_text("as it is")
    (source / "modeling_chatglm.py").write_text("never copied")
    out = tmp_path / "deep" / "er" / "out"
    calls: list[tuple[str, int, int]] = []
    fingerprint = Checkpoint(source).fingerprint()
    convert(source, out, Precision.INT4, None, lambda *call: calls.append(call))
    shutil.rmtree(source)
    config = load_config(out)
    assert load_tokenizer(out, config).encode("hi")
    names = {path.name for path in out.iterdir()}
    layers = {f"layer-{n:05}.safetensors" for n in range(1, config.num_layers + 1)}
    ends = {"embedding.safetensors", "final_layernorm.safetensors", "lm_head.safetensors"}
    small = {"config.json", "MODEL_LICENSE", "tokenizer.model", "tokenizer_config.json"}
    assert names - small == layers | ends | {MANIFEST}
    manifest = json.loads((out / MANIFEST).read_text())
    assert (manifest["version"], manifest["source"]["fingerprint"]) == (2, fingerprint)
    assert manifest["scheme"] == {
        "precision": "int4",
        "bits": 4,
        "group_size": 32,
        "scale_levels": [7.5, 8.0, 8.5],
        "lm_head": "as published",
    }
    assert manifest["config"] == json.loads((out / "config.json").read_text())
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == {
        name: (out / name).stat().st_size for name in layers | ends
    }
    assert made_for(out) == MadeFor(True, "int4", None)
    assert calls[0][:2] == ("embedding", 0)
    assert calls[-1][1] == calls[-1][2]
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    Model.load(open_checkpoint(out), config, Precision.INT4).greedy([5, 6], 2)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_out_of_the_model_is_not_followed(source: Path, tmp_path: Path, name: str) -> None:
    """A folder from elsewhere could so give away any file in the directory that is made; nothing is left of that."""
    (tmp_path / "secret").write_text("{}")
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ConversionError, match=rf"{name} is a link to .*secret, outside of the model's directory"):
        convert(source, tmp_path / "out", Precision.INT8, None)
    assert not (tmp_path / "out").exists()


def test_links_within_a_model_are_followed(source: Path, tmp_path: Path) -> None:
    """One beside the file, and those to `blobs` that a snapshot in the hub's cache consists of."""
    (source / "LICENSE.txt").write_text("as it is")
    (source / "LICENSE").symlink_to("LICENSE.txt")
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    for directory in (snapshot, blobs):
        directory.mkdir(parents=True)
    for path in source.iterdir():
        (blobs / f"of-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/of-{path.name}")
    for model_dir in (source, snapshot):
        out = tmp_path / f"from-{model_dir.name}"
        convert(model_dir, out, Precision.INT8, None)
        assert (out / "LICENSE").read_text() == "as it is"
        assert not (out / "LICENSE").is_symlink()


def test_random_weights_can_be_converted(tmp_path: Path) -> None:
    """`random:SHAPE` becomes a directory, for measuring what loading costs."""
    convert(Path("random:tiny"), tmp_path / "out", Precision.INT4, Precision.INT4)
    assert_equal(outputs(tmp_path / "out", Precision.INT4, (2,)), outputs(Path("random:tiny"), Precision.INT4))


def test_fingerprints_tell_conversions_apart(source: Path, tmp_path: Path) -> None:
    """By precision and by source; the same conversion twice is the same model."""
    write_checkpoint(tmp_path / "other", seed=1)
    prints = []
    for number, (model, precision) in enumerate(
        [
            (source, Precision.INT8),
            (source, Precision.INT8),
            (source, Precision.INT4),
            (tmp_path / "other", Precision.INT8),
        ]
    ):
        convert(model, tmp_path / f"out{number}", Precision(precision), None)
        prints.append(ConvertedCheckpoint(tmp_path / f"out{number}").fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


# -- interrupted writing

KILL = """
import os, signal, sys
from pathlib import Path
from glm.convert import convert
from glm.precision import Precision
real, calls = os.fsync, []
def fsync(handle):
    calls.append(handle)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
convert(Path(sys.argv[1]), Path(sys.argv[2]), Precision.INT8, Precision.INT8)
"""

LIMIT = """
import resource, sys
from pathlib import Path
from glm.convert import convert
from glm.errors import DiskSpaceError
from glm.precision import Precision
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Precision.INT8, Precision.INT8)
except DiskSpaceError as error:
    print(error)
"""


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("sync", [1, 6, 15])
def test_a_killed_conversion_leaves_no_model_and_can_be_started_again(source: Path, tmp_path: Path, sync: int) -> None:
    """SIGKILL in the first file, in the middle and just before the manifest; every file with its own name is whole."""
    out = tmp_path / "out"
    assert run(KILL, source, out, sync).returncode == -9
    assert (out / UNFINISHED).is_file()
    with pytest.raises(GlmError):
        open_checkpoint(out)
    convert(source, out, Precision.INT8, Precision.INT8)
    assert not [path.name for path in out.iterdir() if "tmp" in path.name or path.name == UNFINISHED]
    assert_equal(outputs(out, Precision.INT8), outputs(source, Precision.INT8))


def test_a_full_disk_is_named_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files does what a full disk does: the third file cannot be written whole."""
    done = run(LIMIT, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "File too large; what there was of the conversion is removed" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_needed_and_available_is_said_before_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk too small: both numbers, and no directory made."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 12_000_000))
    with pytest.raises(DiskSpaceError, match=r"needs 0\.07 GB, the disk of .* has 0\.01 GB free"):
        convert(source, tmp_path / "new" / "out", Precision.INT8, Precision.INT8)
    assert not (tmp_path / "new").exists()


def test_a_directory_in_use_is_left_alone(source: Path, tmp_path: Path) -> None:
    """Somebody's files, a file, a conversion that is running, a model that is converted already."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"not empty, it holds thesis\.txt"):
        convert(source, out, Precision.INT8, None)
    with pytest.raises(ConversionError, match="is a file"):
        convert(source, out / "thesis.txt", Precision.INT8, None)
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    nested: list[str] = []

    def convert_there_too(_unit: str, _done: int, _total: int) -> None:
        with pytest.raises(ConversionError, match="being written by another conversion"):
            convert(source, out, Precision.INT8, None)
        nested.append("refused")

    convert(source, out, Precision.INT8, None, convert_there_too)
    assert nested
    ConvertedCheckpoint(out).check()
    with pytest.raises(ConversionError, match="is a converted model already"):
        convert(out, tmp_path / "again", Precision.INT4, None)


# -- manifests nobody should have written


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        raw["files"][name] = raw["files"].pop("layer-00001.safetensors")

    return change


def changed(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(raw: dict[str, Any]) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (renamed("../layer-00001.safetensors"), "not a file of its own directory: refused"),
        (renamed("/etc/passwd"), "not a file of its own directory: refused"),
        (renamed("sub/layer-00001.safetensors"), "not a file of its own directory: refused"),
        (renamed("layer-00009.safetensors"), "names layer-00009, which this model does not have"),
        (changed("files", to={}), "does not name"),
        (changed("files", to=[]), "damaged"),
        (changed("files", "layer-00001.safetensors", "bytes", to=-1), "damaged"),
        (changed("files", "layer-00001.safetensors", "bytes", to=True), "damaged"),
        (changed("files", "layer-00001.safetensors", "bytes", to=7), "says 7: copy it again"),
        (changed("files", "layer-00001.safetensors", "sha256", to="x"), "damaged"),
        (changed("files", "layer-00001.safetensors", "sha256", to="0" * 64), "its checksum differs"),
        (changed("version", to=1), "has version 1, this glmpipe reads 2"),
        (changed("version", to="1"), "has version '1'"),
        (changed("format", to="gguf"), "not the manifest of a converted model"),
        (changed("scheme", "precision", to="int3"), "damaged"),
        (changed("scheme", "precision", to="fp16"), "damaged"),
        (changed("scheme", to=None), "damaged"),
    ],
)
def test_a_tampered_manifest_is_refused(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    """Whatever was changed, the message says what and what to do; no other file is ever opened."""
    out = tmp_path / "out"
    convert(source, out, Precision.INT8, Precision.INT8)
    raw = json.loads((out / MANIFEST).read_text())
    change(raw)
    (out / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=complaint):
        Model.load(open_checkpoint(out), load_config(out), Precision.INT8)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100_000, '{"format": "glmpipe converted model"}'])
def test_a_manifest_that_is_none_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    """Empty, another kind of JSON, too deep."""
    out = tmp_path / "out"
    convert(source, out, Precision.INT8, Precision.INT8)
    (out / MANIFEST).write_text(text)
    with pytest.raises(ManifestError):
        open_checkpoint(out)


def test_files_of_different_conversions_do_not_mix(source: Path, tmp_path: Path) -> None:
    """A layer of another model, same shapes and same size: found by its checksum."""
    write_checkpoint(tmp_path / "other", seed=1)
    for name in ("source", "other"):
        convert(tmp_path / name, tmp_path / f"{name}-out", Precision.INT8, Precision.INT8)
    shutil.copy(tmp_path / "other-out" / "layer-00002.safetensors", tmp_path / "source-out")
    config = load_config(source)
    checkpoint = ConvertedCheckpoint(tmp_path / "source-out")
    LayerStack.load(checkpoint, config, 0, 1, Precision.INT8, CPU)
    with pytest.raises(ShardError, match=r"layer-00002.*checksum differs"):
        LayerStack.load(checkpoint, config, 1, 2, Precision.INT8, CPU)
    (tmp_path / "source-out" / "layer-00002.safetensors").unlink()
    with pytest.raises(ShardError, match="layer-00002"):
        ConvertedCheckpoint(tmp_path / "source-out")
