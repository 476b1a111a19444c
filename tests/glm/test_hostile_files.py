"""Files of a model directory that mean harm: one error that names the file, soon, and nothing outside is read."""

import contextlib
import gc
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glm import json_file
from glm.chat_template import TemplateProcess
from glm.checkpoint import Checkpoint
from glm.config import MOST_LAYERS, load_config
from glm.converted import read_manifest
from glm.dialect import detect_dialect
from glm.errors import ChatFormatError, ConfigError, GlmError, ShardError, TokenizerError
from glm.foreign_model import foreign_folder
from glm.generation import generation_defaults
from glm.small_file import read_whole
from glm.tokenizer import load_tokenizer, split_special
from glm.zip_shard import MOST_PICKLE_BYTES
from tests.tiny_checkpoints import CAUSAL, NATIVE, write_checkpoint
from tests.tiny_tokenizers import tiny_config, train_tokenizer_json


@pytest.mark.parametrize(
    "keys", [{**CAUSAL, "num_layers": 2**31 - 1}, {**NATIVE, "num_hidden_layers": MOST_LAYERS + 1}]
)
def test_more_layers_than_any_model_has(keys: dict[str, object], tmp_path: Path) -> None:
    """Lists are made from this number before a weight is read."""
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=rf"config\.json: num.*layers is \d+, it must be at most {MOST_LAYERS}"):
        load_config(tmp_path)


def test_a_value_of_megabytes_makes_no_message_of_megabytes(tmp_path: Path) -> None:
    """The culprit is named by its beginning."""
    (tmp_path / "config.json").write_text(json.dumps({**CAUSAL, "hidden_size": "x" * 2**20}))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_json_file_far_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is enough to refuse it."""
    monkeypatch.setattr(json_file, "MOST_BYTES", 100)
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    with pytest.raises(ConfigError, match=r"config\.json has \d+ bytes, far more"):
        load_config(tmp_path)


def sparse(path: Path, num_bytes: int) -> None:
    """A file of a size that takes no room on the disk."""
    with path.open("ab") as file:
        file.truncate(num_bytes)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.safetensors.index.json", Checkpoint),
        ("config.json", lambda folder: Checkpoint(folder).fingerprint()),
        ("config.json", load_config),
        ("generation_config.json", lambda folder: generation_defaults(tiny_config("glm"), folder)),
        ("tokenizer_config.json", lambda folder: load_tokenizer(folder, tiny_config("glm"))),
        ("tokenizer.json", lambda folder: load_tokenizer(folder, tiny_config("glm"))),
        ("chat_template.jinja", lambda folder: load_tokenizer(folder, tiny_config("glm"))),
        ("tokenizer.model", lambda folder: load_tokenizer(folder, tiny_config("chatglm2"))),
        ("ice_text.model", lambda folder: load_tokenizer(folder, tiny_config("chatglm"))),
        ("converted.json", read_manifest),
        ("adapter_config.json", foreign_folder),
    ],
)
def test_a_file_of_gigabytes_is_not_read(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    """Every file of a model that is read whole: ten sparse gigabytes are refused by name, in little memory."""
    write_checkpoint(tmp_path, num_shards=2)
    train_tokenizer_json(tmp_path)
    sparse(tmp_path / name, 10 << 30)
    tracemalloc.start()
    try:
        with contextlib.suppress(GlmError):
            told = str(read(tmp_path))
            assert name == "adapter_config.json", told
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def repacked(shard: Path, change: Callable[[zipfile.ZipInfo, bytes], bytes]) -> None:
    """The same zip file, with what `change` makes of each part."""
    with zipfile.ZipFile(shard) as file:
        parts = [(part.filename, file.read(part)) for part in file.infolist()]
    with zipfile.ZipFile(shard, "w") as file:
        for name, data in parts:
            part = zipfile.ZipInfo(name)
            file.writestr(part, change(part, data))


def test_a_pickle_that_unpacks_to_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would unpack it whole: a megabyte on the disk is a gigabyte in memory. What is packed is refused, too."""

    def pad(part: zipfile.ZipInfo, data: bytes) -> bytes:
        return data + bytes(MOST_PICKLE_BYTES) if part.filename.endswith("data.pkl") else data

    def pack(part: zipfile.ZipInfo, data: bytes) -> bytes:
        part.compress_type = zipfile.ZIP_DEFLATED
        return data

    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch has read it"))
    for change, told in ((pad, r"data\.pkl has \d+ bytes"), (pack, "is packed, which torch never does")):
        write_checkpoint(tmp_path, suffix="bin")
        repacked(tmp_path / "pytorch_model.bin", change)
        with pytest.raises(ShardError, match=told):
            Checkpoint(tmp_path)


@pytest.mark.parametrize("is_large", [False, True], ids=["zip", "zip64"])
def test_a_directory_of_gigabytes_is_not_read(tmp_path: Path, is_large: bool) -> None:
    """Its size stands in the record at the file's end, of either kind."""
    write_checkpoint(tmp_path, suffix="bin")
    shard = tmp_path / "pytorch_model.bin"
    num_bytes = 3 << 30
    data = shard.read_bytes()[:-22]
    if is_large:
        record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, num_bytes, 0)
        data += record + struct.pack("<4sIQI", b"PK\x06\x07", 0, len(data), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, 0xFFFFFFFF if is_large else num_bytes, 0xFFFFFFFF, 0)
    shard.write_bytes(data + end)
    with pytest.raises(ShardError, match=f"its directory has {num_bytes} bytes"):
        Checkpoint(tmp_path)


def test_a_small_file_that_has_no_end_is_read_up_to_its_limit() -> None:
    """A size that says little, as of a file that grows or is made up while it is read, does not count."""
    with pytest.raises(ConfigError, match="has 1001 bytes, far more"):
        read_whole(Path("/dev/zero"), ConfigError, 1000)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x" * 300, "\0", "\ud800", "字" * 200]
)
def test_an_index_names_files_of_its_own_directory_only(name: str, tmp_path: Path) -> None:
    """Whatever else it names is refused, or not there; a file beside the directory is never opened."""
    model_dir = tmp_path / "model"
    write_checkpoint(model_dir, num_shards=2)
    shard = next(model_dir.glob("*-of-*"))
    (tmp_path / "secret.safetensors").write_bytes(shard.read_bytes())
    index = model_dir / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "extra": name}}))
    with pytest.raises(ShardError, match=r"index\.json"):
        Checkpoint(model_dir)


def test_a_tokenizer_config_nested_to_the_limit(tmp_path: Path) -> None:
    """What can be read but not be written again decides nothing."""
    for depth in (300, 900, 1500, 50_000):
        (tmp_path / "tokenizer_config.json").write_text("[" * 0 + '{"a":' * depth + "1" + "}" * depth)
        try:
            assert detect_dialect(tiny_config("chatglm2"), tmp_path) in ("chatglm2", "chatglm3")
        except TokenizerError as error:
            assert "tokenizer_config.json" in str(error)


def test_a_chat_template_that_is_no_text(tmp_path: Path) -> None:
    """The file is named."""
    train_tokenizer_json(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(tmp_path, tiny_config("glm"))


def test_a_special_token_without_a_name_cuts_nothing() -> None:
    """The empty text is everywhere, and no token."""
    assert list(split_special("a<x>b", {"": 1, "<x>": 2})) == [("a", None), ("<x>", 2), ("b", None)]
    assert list(split_special("ab", {"": 1})) == [("ab", None)]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 9999999999 }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ x.y.z }}",
        "{{ 'x' * 9000000 }}",
    ],
)
def test_a_template_harms_nobody_but_its_own_process(source: str) -> None:
    """One error for each way to fail, and no memory of ours."""
    with pytest.raises(ChatFormatError):
        TemplateProcess(source).render({"x": 1})


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% if x %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}done",
        "{% if x %}{{ (x + 99999998) ** 99999999 }}{% endif %}done",
    ],
)
def test_a_template_without_end_is_stopped(source: str) -> None:
    """And the next conversation, which it can render, has a new process."""
    template = TemplateProcess(source)
    with pytest.raises(ChatFormatError, match="more time or memory than any template should"):
        template.render({"x": True})
    assert template.render({"x": False}) == "done"


def test_a_template_process_ends_with_its_owner() -> None:
    """Nothing is left of it, and it had no files that it could have written."""
    template = TemplateProcess("{{ x }}")
    pid = template.confined.process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert [line.split()[-3] for line in limits.splitlines() if line.startswith(("Max open", "Max file s"))] == [
        "0",
        "0",
    ]
    del template
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
