"""Compares two safetensors files tensor by tensor and names the first one that differs. Needs no torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from coordinator.errors import CompareError

Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
_PARTS = ("key", "value", "hidden")
"""Of one layer, in the order they are computed: a wrong key is the cause of a wrong hidden state."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two files have and have not in common. `differences` are sentences, in the order of computation."""

    num_compared: int
    max_difference: float
    differences: tuple[str, ...]


def compare(first: Path, second: Path, *, atol: float = 0.0, rtol: float = 0.0) -> Comparison:
    """Compare all tensors; an element differs when |a - b| > atol + rtol * |b|. NaN equals NaN only.

    Raises CompareError when a file is missing, is no safetensors file or holds a dtype numpy does not have.
    """
    with _opened(first) as one, _opened(second) as two:
        in_one, in_two = set(one.keys()), set(two.keys())
        differences = []
        largest = 0.0
        for name in computation_order(in_one | in_two):
            if name not in in_one or name not in in_two:
                owner, other = (first, second) if name in in_one else (second, first)
                differences.append(f"{name} is in {owner} but not in {other}")
                continue
            a, b = _read(one, name, first), _read(two, name, second)
            if a.shape != b.shape:
                differences.append(f"{name} has shape {list(a.shape)} in {first} and {list(b.shape)} in {second}")
                continue
            gap, text = _difference(name, a, b, atol, rtol)
            largest = max(largest, gap)
            differences += [text] if text else []
    return Comparison(len(in_one & in_two), largest, tuple(differences))


def computation_order(names: Iterable[str]) -> list[str]:
    """Tensor names as a token meets them: embedding, each layer's key, value, hidden, final_layernorm, logits."""
    return sorted(names, key=_rank)


def _rank(name: str) -> tuple[int, int, int, str]:
    if name == "embedding":
        return (0, 0, 0, name)
    if match := re.fullmatch(r"layer\.([0-9]{1,6})\.(.+)", name):
        part = _PARTS.index(match[2]) if match[2] in _PARTS else len(_PARTS)
        return (1, int(match[1]), part, name)
    last = {"final_layernorm": 2, "logits": 3}
    return (last.get(name, 4), 0, 0, name)


def _opened(path: Path) -> safe_open:
    if not path.is_file():
        raise CompareError(f"{path} is not a file; give two files that `glmpipe dump` wrote")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        raise CompareError(f"{path} is not a safetensors file ({error})") from None


def _read(file: safe_open, name: str, path: Path) -> Values:
    try:
        tensor: Values = file.get_tensor(name).astype(np.float64)
    except (SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise CompareError(f"{name} in {path} cannot be read ({error}); a dump holds float32") from None
    return tensor


def _difference(name: str, a: Values, b: Values, atol: float, rtol: float) -> tuple[float, str | None]:
    """The largest absolute difference (NaN against a number counts as infinite), and a sentence if it matters."""
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        gaps = np.where(np.isnan(gaps), np.inf, gaps)
        allowed = atol + rtol * np.abs(b)
    differs = gaps > np.where(np.isfinite(allowed), allowed, atol)
    largest = float(gaps.max(initial=0.0))
    if not differs.any():
        return largest, None
    where = np.unravel_index(int(np.argmax(np.where(differs, gaps, -1.0))), gaps.shape)
    first = tuple(int(index) for index in np.argwhere(differs)[0])
    return largest, (
        f"{name} differs by {gaps[where]:.6g} at {_index(where)}: {a[where]:.9g} and {b[where]:.9g};"
        f" {int(differs.sum())} of {gaps.size} elements differ, the first at {_index(first)}"
    )


def _index(index: Sequence[np.intp] | Sequence[int]) -> str:
    return "[" + ", ".join(str(int(i)) for i in index) + "]"
