"""Integer weights with scales: quantise, pack, unpack, dequantise.

One scheme serves everything: `w = int * scale`, symmetric, with one scale for each group of columns in each row. A
published checkpoint has one group per row; this project's own int8 too, its own int4 has small groups. Four-bit values
are packed as the publisher does: byte j of a row holds column 2j in the high nibble and column 2j+1 in the low one,
both in two's complement (-8..7).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm.errors import PrecisionError
from glm.precision import Precision

# Both chosen by measured error: docs/measurements.md.
INT4_GROUP_SIZE = 32
INT4_LEVELS = (7.5, 8.0, 8.5)
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`values`: int8 [rows, columns], or [rows, columns/2] packed when `bits` is 4; `scales`: [rows, num_groups].

    `is_exact`: the integers are the model itself, as in a published quantised checkpoint, and products are computed as
    exactly as in fp32. Of a float model they are an approximation, next to which 16 bits of an activation lose nothing.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bits: int
    is_exact: bool = False

    @property
    def num_rows(self) -> int:
        """Output features."""
        return self.values.shape[0]

    @property
    def num_columns(self) -> int:
        """Input features."""
        return self.values.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of the values and scales together."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales))

    def rows(self, selection: slice | torch.Tensor) -> "QuantizedWeight":
        """The same weight with only some rows (a slice is a view)."""
        return QuantizedWeight(self.values[selection], self.scales[selection], self.bits, self.is_exact)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] in `dtype`, multiplied in fp32: scales may be too small for fp16."""
        values = unpack_int4(self.values) if self.bits == 4 else self.values
        grouped = values.to(torch.float32).view(self.num_rows, self.scales.shape[1], -1)
        return grouped.mul_(self.scales.to(torch.float32).unsqueeze(-1)).view(self.num_rows, -1).to(dtype)

    def row_blocks(self) -> list[slice]:
        """Row ranges small enough that a dequantised block stays in the cache."""
        return row_blocks(self.num_rows, self.num_columns)


StoredPart = torch.Tensor | QuantizedWeight
"""One matrix or vector of the network as a file holds it."""


def row_blocks(num_rows: int, num_columns: int) -> list[slice]:
    """Row ranges of a matrix that hold about a million elements each: fast, and little beside the matrix."""
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    return [slice(a, min(a + step, num_rows)) for a in range(0, num_rows, step)]


def pack_int4(values: torch.Tensor) -> torch.Tensor:
    """int8 values in -8..7, [rows, columns] -> int8 [rows, columns/2]."""
    return (values[:, 0::2] << 4) | (values[:, 1::2] & 0x0F)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """int8 [rows, columns/2] -> int8 values in -8..7, [rows, columns]."""
    high, low = packed >> 4, (packed << 4) >> 4
    return torch.stack((high, low), dim=-1).view(packed.shape[0], -1)


def group_size(bits: int, num_columns: int) -> int:
    """Columns that share a scale: a whole row in int8; in int4 32, or the largest power of two below that fits."""
    return num_columns if bits == 8 else math.gcd(num_columns, INT4_GROUP_SIZE)


def scale_dtype(bits: int) -> torch.dtype:
    """Of the scales that `quantize` makes."""
    return torch.float16 if bits == 4 else torch.float32


def quantize(
    weight: torch.Tensor | QuantizedWeight, precision: Precision, device: torch.device | None = None
) -> QuantizedWeight:
    """Quantise a weight [rows, columns], on `device` (default: the CPU).

    Goes block of rows by block, so that memory beyond the result stays small whatever the matrix.

    Raises:
        PrecisionError: int4 of an odd number of columns.
    """
    bits, device = precision.bits, device or torch.device("cpu")
    num_rows, num_columns = (
        (weight.num_rows, weight.num_columns) if isinstance(weight, QuantizedWeight) else weight.shape
    )
    group = group_size(bits, num_columns)
    if bits == 4 and group < 2:
        raise PrecisionError(f"int4 needs an even number of input features, not {num_columns}; use int8")
    values = torch.empty(num_rows, num_columns * bits // 8, dtype=torch.int8, device=device)
    scales = torch.empty(num_rows, num_columns // group, dtype=scale_dtype(bits), device=device)
    for block in row_blocks(num_rows, num_columns):
        grouped = float_rows(weight, block, torch.float32).to(device).view(-1, num_columns // group, group)
        scales[block] = int4_scales(grouped) if bits == 4 else grouped.abs().amax(-1) / 127
        integers = round_to_scale(grouped, scales[block].to(torch.float32), bits).to(torch.int8).flatten(1)
        values[block] = pack_int4(integers) if bits == 4 else integers
    return QuantizedWeight(values, scales, bits)


def float_rows(weight: torch.Tensor | QuantizedWeight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a weight, in `dtype`."""
    if isinstance(weight, QuantizedWeight):
        return weight.rows(rows).dequantize(dtype)
    return weight[rows].to(dtype)


def round_to_scale(grouped: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers, still in fp32, nearest to [rows, groups, group] over their scales [rows, groups]."""
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    inverse = torch.where(scales != 0, 1 / scales, 0.0).unsqueeze(-1)
    return (grouped * inverse).round_().clamp_(low, high)


def int4_scales(grouped: torch.Tensor, levels: Sequence[float] = INT4_LEVELS) -> torch.Tensor:
    """[rows, groups, group] -> [rows, groups]: the scale, of a few candidates, with the least squared error.

    The value of largest magnitude, divided by minus each of `levels`, gives the candidates: at 8 it maps to -8, the
    end of the longer side; with fewer levels no value is clipped, with more it is, in favour of all others. A group
    that has no such scale, because a value is NaN, infinite or beyond what fp16 scales reach, gets NaN: it shows in
    what is computed with it, as it would at any other precision.
    """
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best = torch.zeros_like(extreme)
    best_error = torch.full_like(extreme, torch.inf)
    for level in levels:
        scale = (extreme / -level).to(torch.float16).to(torch.float32)
        rounded = round_to_scale(grouped, scale, bits=4).mul_(scale.unsqueeze(-1))
        error = rounded.sub_(grouped).square_().sum(-1)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    return torch.where(best_error.isfinite(), best, torch.nan)
