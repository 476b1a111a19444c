"""Files of parts: exact, whole or absent, and nothing in them is believed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from glm.errors import MissingTensorError, ShardError, TensorShapeError
from glm.layout import Source, Unit
from glm.part_file import PartFile, write_parts
from glm.precision import Precision
from glm.quantization import QuantizedWeight, StoredPart, quantize

ROWS, COLUMNS = 19, 96
UNIT = Unit(
    "layer-00003",
    {
        "fused.weight": Source(("q.weight", "k.weight"), (16, 3), COLUMNS),
        "norm.weight": Source(("norm.weight",), (COLUMNS,)),
        "up.weight": Source(("up.weight",), (ROWS,), COLUMNS),
        "down.weight": Source(("down.weight",), (ROWS,), COLUMNS),
    },
)


def make_parts() -> dict[str, StoredPart]:
    weight = torch.randn(ROWS, COLUMNS)
    return {
        "fused.weight": quantize(weight, Precision.INT4),
        "norm.weight": torch.randn(COLUMNS).to(torch.bfloat16),
        "up.weight": quantize(weight * 3, Precision.INT8),
        "down.weight": weight.to(torch.float16),
    }


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "layer-00003.safetensors"
    write_parts(path, UNIT, make_parts())
    return path


def assert_same(found: StoredPart, wanted: StoredPart) -> None:
    if isinstance(wanted, QuantizedWeight):
        assert isinstance(found, QuantizedWeight)
        assert found.bits == wanted.bits
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.scales, wanted.scales)
        assert found.scales.dtype == wanted.scales.dtype
    else:
        assert isinstance(found, torch.Tensor)
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)


def test_parts_come_back_as_they_were(tmp_path: Path) -> None:
    """Every kind of part: fused int4, int8, floats; the file is one that any safetensors reader knows."""
    parts, path = make_parts(), tmp_path / "x.safetensors"
    facts = write_parts(path, UNIT, parts)
    file = PartFile(path)
    found = file.parts(UNIT)
    assert set(found) == set(parts)
    for name, part in parts.items():
        assert_same(found[name], part)
    file.check()
    assert (facts.num_bytes, facts.sha256) == (path.stat().st_size, file.sha256)
    assert set(load_file(path)) >= {"q.weight+k.weight", "q.weight+k.weight_scale", "up.weight_scale", "down.weight"}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_part_is_mapped_when_it_is_asked_for(written: Path) -> None:
    """Two askings give two mappings: memory goes back with the tensor, not with the file."""
    parts = PartFile(written).parts(UNIT)
    first, second = parts["norm.weight"], parts["norm.weight"]
    assert isinstance(first, torch.Tensor)
    assert isinstance(second, torch.Tensor)
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("keep", [0, 4, 60, 0.5, 0.99])
def test_a_truncated_file_does_not_open(written: Path, keep: float) -> None:
    """Wherever it ends."""
    data = written.read_bytes()
    written.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(ShardError, match=r"layer-00003.* truncated or damaged"):
        PartFile(written)


def test_changed_bytes_are_found(written: Path) -> None:
    """In a sample at once, anywhere by a full check."""
    data = bytearray(written.read_bytes())
    data[-1] ^= 1
    written.write_bytes(data)
    with pytest.raises(ShardError, match="samples"):
        PartFile(written)
    big = Unit("big", {"table": Source(("table",), (1024,), 1024)})
    write_parts(written, big, {"table": torch.zeros(1024, 1024)})
    data = bytearray(written.read_bytes())
    data[100_000] ^= 1  # between two samples
    written.write_bytes(data)
    with pytest.raises(ShardError, match="SHA-256"):
        PartFile(written).check()


def swap_types(entries: dict[str, Any]) -> None:
    entries["norm.weight"]["dtype"] = "F16"


def swap_places(entries: dict[str, Any]) -> None:
    down, other = entries["down.weight"], {**entries["down.weight"]}
    entries["down.weight"], entries["gate.weight"] = entries["gate.weight"], other
    assert down != entries["down.weight"]


def swap_meaning(entries: dict[str, Any]) -> None:
    entries["up.weight_exact_scale"] = entries.pop("up.weight_scale")


def swap_owners(entries: dict[str, Any]) -> None:
    entries["__metadata__"]["owner"] = "somebody else"


@pytest.mark.parametrize("change", [swap_types, swap_places, swap_meaning, swap_owners])
def test_a_changed_header_is_found(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Another type of the same size, two tensors in each other's place, another kind of scales: never other weights."""
    path = tmp_path / "layer-00003.safetensors"
    unit = Unit("layer-00003", {**UNIT.sources, "gate.weight": Source(("gate.weight",), (ROWS,), COLUMNS)})
    parts = {**make_parts(), "gate.weight": torch.randn(ROWS, COLUMNS).to(torch.float16)}
    write_parts(path, unit, parts, owner="me")
    assert PartFile(path).owner == "me"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ShardError, match="samples"):
        PartFile(path)


def test_a_file_replaced_under_a_reader_is_noticed(written: Path) -> None:
    """Another file of this name has other offsets: what was learned from the first is not used for it."""
    parts = PartFile(written).parts(UNIT)
    write_parts(written, UNIT, make_parts())
    with pytest.raises(ShardError, match="replaced"):
        parts["norm.weight"]


def test_wrong_shapes_and_absent_parts_are_named(written: Path) -> None:
    """Before anything is read of them."""
    file = PartFile(written)
    absent = Unit("u", {"a": Source(("nothing",), (1,))})
    wide = Unit("u", {"a": Source(("up.weight",), (ROWS,), 5 * COLUMNS)})
    flat = Unit("u", {"a": Source(("up.weight",), (ROWS * COLUMNS,))})
    with pytest.raises(MissingTensorError, match="nothing is not in this file"):
        file.parts(absent)
    for unit in (wide, flat):
        with pytest.raises(TensorShapeError, match=r"up\.weight is"):
            file.parts(unit)


def hostile(path: Path, header: Any, data: bytes = b"\0" * 64) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


ENTRY = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 1},
        {"a": {**ENTRY, "dtype": "O"}},
        {"a": {**ENTRY, "shape": [-4, -4]}},
        {"a": {**ENTRY, "shape": [4.0, 4]}},
        {"a": {**ENTRY, "shape": [1 << 60, 1 << 60]}},
        {"a": {**ENTRY, "data_offsets": [0, 128]}},
        {"a": {**ENTRY, "data_offsets": [-64, 0]}},
        {"a": {**ENTRY, "data_offsets": [64, 128]}},
        {"a": ENTRY, "b": ENTRY},
        {"__metadata__": 1, "a": ENTRY},
        {"a": ENTRY},
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: Any) -> None:
    """Not JSON of the right form, or offsets and shapes that do not tile the file; no crash, no allocation."""
    path = tmp_path / "x.safetensors"
    hostile(path, header)
    with pytest.raises(ShardError, match="truncated or damaged"):
        PartFile(path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """With the one error that names the file."""
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ShardError):
        PartFile(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    """And so is a directory in its place."""
    (tmp_path / "dir").mkdir()
    for name in ("absent", "dir"):
        with pytest.raises(ShardError, match=f"{name} cannot be read"):
            PartFile(tmp_path / name)
