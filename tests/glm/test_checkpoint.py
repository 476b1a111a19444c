"""Every layout on disk loads, and everything that can be wrong with one is said by name, with the remedy."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.errors import CheckpointError, ConfigError, LfsPointerError, MissingTensorError, ShardError, TensorShapeError
from glm.model import LayerStack, Model
from glm.precision import Precision
from tests.tiny_checkpoints import CAUSAL, FAMILIES, NATIVE, PREFIX, write_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9\n"
QKV = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
PROMPTS = {"chatglm": [5, 6, 91, 94], "chatglm2": [5, 6, 7], "glm": [5, 6, 7], "glm4": [5, 6, 7]}


def load(model_dir: Path) -> Model:
    return Model.load(Checkpoint(model_dir), load_config(model_dir))


def edit_tensors(shard: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of a safetensors file; None takes one out."""
    tensors = {**load_file(shard), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, shard)


def cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layouts_of_one_model_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    """Safetensors, .bin and the .bin of old, in one file or in three that cut layers in two."""
    answers = set()
    for suffix, legacy in (("safetensors", False), ("bin", False), ("bin", True)):
        for num_shards in (1, 3):
            model_dir = tmp_path / f"{suffix}-{legacy}-{num_shards}"
            write_checkpoint(model_dir, FAMILIES[family], suffix=suffix, legacy=legacy, num_shards=num_shards)
            answers.add(tuple(load(model_dir).greedy(PROMPTS[family], 6)))
    assert len(answers) == 1


def test_a_layer_may_lie_in_two_shards(tmp_path: Path) -> None:
    """As in the published models; the fixture really cuts one."""
    config = write_checkpoint(tmp_path, num_shards=3)
    checkpoint = Checkpoint(tmp_path)
    cut_layers = {
        layer
        for layer in range(config.num_layers)
        if len({shard for name, shard in checkpoint.shard_of.items() if f"layers.{layer}." in name}) == 2
    }
    assert cut_layers
    assert len(load(tmp_path).layers.blocks) == config.num_layers


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    """A directory with both formats is read from the one that needs no unpickling, index or not."""
    write_checkpoint(tmp_path, suffix="bin", num_shards=2)
    write_checkpoint(tmp_path, suffix="safetensors")
    assert {shard.name for shard in Checkpoint(tmp_path).shard_of.values()} == {"model.safetensors"}


def test_a_range_of_layers_touches_only_its_shards(tmp_path: Path) -> None:
    """A worker can load its layers although another's shard turns out to be damaged inside."""
    config = write_checkpoint(tmp_path, suffix="bin", legacy=True, num_shards=4)
    cut(tmp_path / "pytorch_model-00004-of-00004.bin", 4000)
    stack = LayerStack.load(Checkpoint(tmp_path), config, 0, 1, Precision.FP32, torch.device("cpu"))
    assert stack.weight_bytes > 0
    with pytest.raises(ShardError, match=r"pytorch_model-00004-of-00004.bin is truncated or damaged at 4000 bytes"):
        LayerStack.load(Checkpoint(tmp_path), config, 3, 4, Precision.FP32, torch.device("cpu"))


def test_progress_counts_layers_and_bytes(tmp_path: Path) -> None:
    """After each layer: how many, of how many, and the bytes so far; at the end those the stack says it holds."""
    config = write_checkpoint(tmp_path)
    seen: list[tuple[int, int, int]] = []
    stack = LayerStack.load(
        Checkpoint(tmp_path), config, 1, 4, Precision.FP32, torch.device("cpu"), lambda *facts: seen.append(facts)
    )
    assert [facts[:2] for facts in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] == 3 * seen[0][2] == stack.weight_bytes


@pytest.mark.parametrize(
    ("suffix", "num_shards", "file_name"),
    [
        ("safetensors", 1, "model.safetensors"),
        ("safetensors", 2, "model-00002-of-00002.safetensors"),
        ("safetensors", 2, "model.safetensors.index.json"),
        ("bin", 1, "pytorch_model.bin"),
        ("bin", 2, "pytorch_model-00001-of-00002.bin"),
        ("bin", 2, "pytorch_model.bin.index.json"),
    ],
)
def test_lfs_pointers_are_recognised(suffix: str, num_shards: int, file_name: str, tmp_path: Path) -> None:
    """A clone without git-lfs: named before anything is loaded, with the command that helps."""
    write_checkpoint(tmp_path, suffix=suffix, num_shards=num_shards)
    (tmp_path / file_name).write_bytes(POINTER)
    with pytest.raises(LfsPointerError, match=f"{file_name} is a Git-LFS pointer of {len(POINTER)} bytes") as caught:
        Checkpoint(tmp_path)
    assert "git lfs pull" in str(caught.value)


def test_a_config_that_is_an_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    """config.json too, in case somebody tracks all files."""
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(POINTER)
    with pytest.raises(ConfigError, match=r"config.json is a Git-LFS pointer.*git lfs pull"):
        load_config(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "legacy"])
def test_truncated_shards_are_refused(kind: str, kept: float, tmp_path: Path) -> None:
    """Cut at nothing, in the header, in the data, before the last byte: the file, its size, download again."""
    write_checkpoint(tmp_path, suffix="safetensors" if kind == "safetensors" else "bin", legacy=kind == "legacy")
    shard = next(path for path in tmp_path.iterdir() if path.name != "config.json")
    size = shard.stat().st_size
    kept_bytes = size - 1 if kept == -1 else int(kept * size) if isinstance(kept, float) else kept
    cut(shard, kept_bytes)
    with pytest.raises(ShardError, match=f"{shard.name} is truncated or damaged at {kept_bytes} bytes") as caught:
        load(tmp_path)
    assert "download it again" in str(caught.value)


def test_damage_inside_a_zip_is_refused(tmp_path: Path) -> None:
    """The ends of the file are there, its middle is not what it was."""
    write_checkpoint(tmp_path, suffix="bin")
    shard = tmp_path / "pytorch_model.bin"
    content = bytearray(shard.read_bytes())
    content[60:400] = bytes(340)
    shard.write_bytes(content)
    with pytest.raises(ShardError, match=r"pytorch_model.bin is truncated or damaged"):
        load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """One file without index: the tensor and what it may mean."""
    write_checkpoint(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", **{QKV: None})
    with pytest.raises(MissingTensorError, match=f"tensor {QKV} is in no shard; the download is incomplete or config"):
        load(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tensor_that_the_index_promises_is_named(suffix: str, tmp_path: Path) -> None:
    """The index says it is in a shard, the shard does not have it."""
    write_checkpoint(tmp_path, suffix=suffix, num_shards=2)
    index = next(tmp_path.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    other = next(name for name in set(weight_map.values()) if name != weight_map[QKV])
    index.write_text(json.dumps({"weight_map": {**weight_map, QKV: other}}))
    with pytest.raises(MissingTensorError, match=f"{other}: the index says tensor {QKV} is here, but it is not"):
        load(tmp_path)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    """What the shard holds, and what config.json implies."""
    write_checkpoint(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", **{QKV: torch.zeros(64, 30)})
    with pytest.raises(TensorShapeError, match=rf"tensor {QKV} has shape \[64, 30\], config.json implies \[64, 32\]"):
        load(tmp_path)


@pytest.mark.parametrize("end", ["transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"])
def test_misshapen_ends_are_named(end: str, tmp_path: Path) -> None:
    """A vocabulary of another size than config.json says."""
    write_checkpoint(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", **{end: torch.zeros(95, 32)})
    with pytest.raises(TensorShapeError, match=rf"tensor {end} has shape \[95, 32\], config.json implies \[96, 32\]"):
        load(tmp_path)


def test_an_index_that_names_an_absent_file(tmp_path: Path) -> None:
    """The file is named before anything is loaded."""
    write_checkpoint(tmp_path, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        ShardError, match=r"index.json names model-00002-of-00003.safetensors, which is not there: download that shard"
    ):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("escape", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ""])
def test_an_index_cannot_lead_out_of_its_directory(escape: str, tmp_path: Path) -> None:
    """File names only, whatever exists elsewhere."""
    write_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {QKV: escape}}))
    with pytest.raises(ShardError, match=f"names '{escape}', which is not a file of its own directory"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": null}', "\udce4"])
def test_an_unreadable_index_is_refused(text: str, tmp_path: Path) -> None:
    """Not JSON, or not an index."""
    write_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        ShardError,
        match=r"index.json (is not readable JSON|is not a readable weight index|holds a list).* download it again",
    ):
        Checkpoint(tmp_path)


def test_a_directory_without_weights_says_what_it_looked_for(tmp_path: Path) -> None:
    """And how to get it; or that the index of the shards was forgotten."""
    write_checkpoint(tmp_path, num_shards=2)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.safetensors is there but its index is not"):
        Checkpoint(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()
    said = r"no weights: none of model.safetensors.index.json, .*\.bin is there: .*`git lfs pull`.* --local-dir"
    with pytest.raises(CheckpointError, match=said):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(legacy: bool, tmp_path: Path) -> None:
    """A .bin whose pickle calls something: the call does not happen, the file is named."""

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was-run"),)

    write_checkpoint(tmp_path, suffix="bin")
    hostile = {"transformer.embedding.word_embeddings.weight": Hostile()}
    torch.save(hostile, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ShardError, match=r"pytorch_model.bin holds more than tensors: it asks for \w+.mkdir") as caught:
        load(tmp_path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"nested": torch.zeros(1)}}, torch.zeros(3)])
def test_a_bin_that_is_no_dict_of_tensors_is_refused(content: object, tmp_path: Path) -> None:
    """A trainer's state, a lone tensor: not a published shard."""
    write_checkpoint(tmp_path, suffix="bin")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ShardError, match=r"pytorch_model.bin does not hold a dict of tensors"):
        load(tmp_path)


def test_parameters_are_as_good_as_tensors(tmp_path: Path) -> None:
    """Some fine-tunes saved nn.Parameters: they load, and no gradient is kept of anything."""
    write_checkpoint(tmp_path, suffix="bin")
    shard = tmp_path / "pytorch_model.bin"
    tensors = torch.load(shard, weights_only=True)
    wanted = load(tmp_path).greedy([5, 6, 7], 4)
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, shard)
    model = load(tmp_path)
    assert not model.embedding.forward(torch.tensor([5])).requires_grad
    assert model.greedy([5, 6, 7], 4) == wanted


@pytest.mark.parametrize("keys", [CAUSAL, PREFIX])
def test_packed_weights_without_quantization_bit_are_refused(keys: dict[str, object], tmp_path: Path) -> None:
    """The config.json of the float model beside quantised weights."""
    write_checkpoint(tmp_path, {**keys, "quantization_bit": 8})
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(CheckpointError, match=r"query_key_value.weight_scale says the weights are quantised"):
        load(tmp_path)


def test_packed_weights_of_other_bits_are_refused(tmp_path: Path) -> None:
    """quantization_bit 8 beside int4 weights: half the columns are missing."""
    write_checkpoint(tmp_path, {**CAUSAL, "quantization_bit": 4})
    (tmp_path / "config.json").write_text(json.dumps({**CAUSAL, "quantization_bit": 8}))
    with pytest.raises(TensorShapeError, match=r"query_key_value.weight has shape \[64, 16\], .* implies \[64, 32\]"):
        load(tmp_path)


def test_integers_without_scales_are_refused(tmp_path: Path) -> None:
    """Some other quantisation: named, not multiplied."""
    write_checkpoint(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", **{QKV: torch.zeros(64, 32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=f"tensor {QKV} is torch.int8 without scales: this quantisation"):
        load(tmp_path)


def test_a_model_that_is_not_tied_needs_its_lm_head(tmp_path: Path) -> None:
    """Only tie_word_embeddings makes the embedding serve as output projection."""
    write_checkpoint(tmp_path, {**NATIVE, "tie_word_embeddings": True})
    assert load(tmp_path).greedy([5, 6, 7], 2)
    (tmp_path / "config.json").write_text(json.dumps(NATIVE))
    with pytest.raises(MissingTensorError, match=r"tensor lm_head.weight is in no shard"):
        load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_shard_is_named(tmp_path: Path) -> None:
    """Permissions of another user's download."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(ShardError, match=r"model.safetensors cannot be read \(Permission denied\): check"):
        Checkpoint(tmp_path)


def test_a_shard_that_vanishes_is_named(tmp_path: Path) -> None:
    """Found when the checkpoint was opened, gone when a layer is read."""
    config = write_checkpoint(tmp_path, num_shards=2, suffix="bin")
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ShardError, match=r"pytorch_model-00002-of-00002.bin cannot be read \(No such file"):
        LayerStack.load(checkpoint, config, 3, 4, Precision.FP32, torch.device("cpu"))


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    """Equal for copies of one model wherever they lie; other weights, another config: another word."""
    same = [write_checkpoint(tmp_path / name, num_shards=2) and tmp_path / name for name in ("a", "b")]
    write_checkpoint(tmp_path / "other-seed", num_shards=2, seed=1)
    write_checkpoint(tmp_path / "other-config", {**CAUSAL, "seq_length": 128}, num_shards=2)
    words = [Checkpoint(path).fingerprint() for path in (*same, tmp_path / "other-seed", tmp_path / "other-config")]
    assert words[0] == words[1]
    assert len(set(words)) == 3
