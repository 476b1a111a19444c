"""Compare: the first tensor that differs is named, with how much and where."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator.cli import main
from coordinator.compare import compare, computation_order
from coordinator.errors import CompareError

Tensors = dict[str, np.ndarray]


@pytest.fixture
def tensors() -> Tensors:
    """A small dump of two layers."""
    values = np.random.default_rng(0)
    names = [f"layer.{i}.{part}" for i in (0, 1) for part in ("hidden", "key", "value")]
    names += ["embedding", "final_layernorm", "logits"]
    return {name: values.standard_normal((3, 4)).astype(np.float32) for name in names}


def save(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def test_a_dump_is_the_same_as_its_copy(tmp_path: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 and a line that says what was compared."""
    a, b = save(tmp_path / "a", tensors), save(tmp_path / "b", tensors)
    assert main(["compare", str(a), str(b)]) == 0
    assert capsys.readouterr().out == "the same: 9 tensors, largest difference 0 (atol 0, rtol 0)\n"


def test_the_first_difference_in_the_order_of_computation_is_named(
    tmp_path: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cause, layer 1's key, not the consequences after it; with -v all of them."""
    a = save(tmp_path / "a", tensors)
    for name in ("layer.1.key", "layer.1.hidden", "logits"):
        tensors[name] = tensors[name].copy()
        tensors[name][2, 1] += np.float32(0.5)
    b = save(tmp_path / "b", tensors)
    assert main(["compare", str(a), str(b)]) == 1
    first, summary = capsys.readouterr().out.splitlines()
    assert first.startswith("layer.1.key differs by 0.5")
    assert "at [2, 1]: " in first
    assert "1 of 12 elements differ, the first at [2, 1]" in first
    assert summary.startswith("3 tensors differ, 9 are in both files")
    main(["compare", "-v", str(a), str(b)])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_tolerances_are_absolute_and_relative_to_the_second_file(tmp_path: Path) -> None:
    """|a - b| <= atol + rtol * |b| is the same."""
    a = save(tmp_path / "a", {"x": np.array([1.0, 100.0], np.float32)})
    b = save(tmp_path / "b", {"x": np.array([1.25, 101.0], np.float32)})
    assert len(compare(a, b).differences) == 1
    assert compare(a, b, atol=1.0).differences == ()
    assert "1 of 2 elements" in compare(a, b, atol=0.25).differences[0]
    assert "1 of 2 elements" in compare(a, b, rtol=0.01).differences[0]
    assert compare(a, b, atol=0.25, rtol=0.01).differences == ()
    assert compare(a, b, atol=1.0).max_difference == 1.0


def test_missing_tensors_and_shapes_are_differences(tmp_path: Path, tensors: Tensors) -> None:
    """Whatever one file has and the other has not."""
    a = save(tmp_path / "a", tensors)
    del tensors["embedding"]
    tensors["logits"] = tensors["logits"][:2]
    tensors["extra"] = tensors["logits"]
    b = save(tmp_path / "b", tensors)
    missing, shape, extra = compare(a, b).differences
    assert missing == f"embedding is in {a} but not in {b}"
    assert shape == f"logits has shape [3, 4] in {a} and [2, 4] in {b}"
    assert extra == f"extra is in {b} but not in {a}"


@pytest.mark.parametrize(
    ("x", "y", "same"),
    [
        (np.nan, np.nan, True),
        (np.inf, np.inf, True),
        (np.nan, 0.0, False),
        (np.inf, -np.inf, False),
        (0.0, np.inf, False),
        (0.0, -0.0, True),
    ],
)
def test_nan_and_infinity_equal_themselves_only(tmp_path: Path, x: float, y: float, same: bool) -> None:
    """No tolerance hides a NaN or an infinity."""
    a = save(tmp_path / "a", {"x": np.array([x], np.float32)})
    b = save(tmp_path / "b", {"x": np.array([y], np.float32)})
    assert (compare(a, b, atol=1e9, rtol=1e9).differences == ()) is same


def test_empty_and_scalar_tensors_can_be_compared(tmp_path: Path) -> None:
    """No element, or one without an index."""
    a = save(tmp_path / "a", {"none": np.zeros((0, 3), np.float32), "one": np.array(1, np.int64)})
    b = save(tmp_path / "b", {"none": np.zeros((0, 3), np.float32), "one": np.array(2, np.int64)})
    assert compare(a, b).differences == ("one differs by 1 at []: 1 and 2; 1 of 1 elements differ, the first at []",)


def test_names_are_ordered_as_a_token_meets_them() -> None:
    """Layer 10 comes after layer 9, and what is unknown comes last."""
    names = ["zeta", "logits", "layer.10.key", "layer.9.hidden", "layer.9.value", "final_layernorm", "embedding"]
    assert computation_order(names) == [
        "embedding",
        "layer.9.value",
        "layer.9.hidden",
        "layer.10.key",
        "final_layernorm",
        "logits",
        "zeta",
    ]


def test_a_file_that_cannot_be_used_is_an_error_of_its_own(
    tmp_path: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, which is not 'different', for a missing file, another format and an impossible tolerance."""
    good = save(tmp_path / "a", tensors)
    (tmp_path / "text").write_text("not a tensor")
    with pytest.raises(CompareError, match="not a safetensors file"):
        compare(good, tmp_path / "text")
    assert main(["compare", str(good), str(tmp_path / "absent")]) == 2
    assert main(["compare", str(tmp_path), str(good)]) == 2
    assert main(["compare", str(good), str(good), "--atol=-1"]) == 2
    assert [line[:9] for line in capsys.readouterr().err.splitlines()] == ["glmpipe: "] * 3
