"""Integer weights in the order in which the native kernels read them."""

from dataclasses import dataclass

import torch

from glm.quantization import QuantizedWeight, pack_int4, row_blocks

BLOCK_ROWS = 16
GROUP_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The integers and scales of a `QuantizedWeight`, in blocks of 16 rows by groups of 32 columns.

    `values`: uint8 [blocks, groups, fours, 16, 4], unsigned (plus 8 or 128), four columns of 16 rows after each other;
    in int4 a byte holds column c in its low half and c + 16 in its high one. `scales`: fp16 [blocks, groups, 16], or
    fp32 [blocks, 1, 16] for one scale a row.
    """

    values: torch.Tensor
    scales: torch.Tensor
    bits: int
    num_rows: int
    num_columns: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the values and scales together."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales))

    def rows(self, selection: slice | torch.Tensor) -> QuantizedWeight:
        """Some rows as they were before packing (scales of one a row in fp32)."""
        ids = torch.arange(self.num_rows)[selection]
        block, row = ids // BLOCK_ROWS, ids % BLOCK_ROWS
        chosen = self.values[block, :, :, row]
        if self.bits == 4:
            integers = torch.stack((chosen & 15, chosen >> 4), dim=2).to(torch.int8) - 8
        else:
            integers = (chosen ^ 128).view(torch.int8)
        integers = integers.flatten(1)[:, : self.num_columns]
        values = pack_int4(integers) if self.bits == 4 else integers.contiguous()
        return QuantizedWeight(values, self.scales[block, :, row], self.bits)

    def row_blocks(self) -> list[slice]:
        """Row ranges small enough that a dequantised block stays in the cache."""
        return row_blocks(self.num_rows, self.num_columns)


def packed_shape(weight: QuantizedWeight) -> tuple[int, int, int, int, int]:
    """The shape of `PackedWeight.values`."""
    num_blocks = -(-weight.num_rows // BLOCK_ROWS)
    return num_blocks, -(-weight.num_columns // GROUP_COLUMNS), weight.bits, BLOCK_ROWS, 4
