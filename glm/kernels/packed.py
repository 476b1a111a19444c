"""Integer weights in the order in which the native kernels read them."""

from dataclasses import dataclass

import torch

from glm.quantization import QuantizedWeight, pack_int4, row_blocks

BLOCK_ROWS = 32
GROUP_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """The integers and scales of a `QuantizedWeight`, as records of 32 rows by a group of 32 columns.

    `values`: uint8 [blocks, groups, record]. A record holds [fours, 32, 4] unsigned integers (plus 8 or 128), four
    columns of 32 rows after each other; in int4 a byte holds column c in its low half and c + 16 in its high one. Where
    groups have scales, 32 of them in fp16 end the record. `scales`: otherwise fp32 [blocks * 32], one for each row.
    `is_exact`: as in `QuantizedWeight`.
    """

    values: torch.Tensor
    scales: torch.Tensor | None
    bits: int
    num_rows: int
    num_columns: int
    is_exact: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the values and scales together."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales) if t is not None)

    @property
    def group_scales(self) -> torch.Tensor:
        """fp16 [blocks, groups, 32], a view into the records."""
        return self.values[:, :, BLOCK_ROWS * GROUP_COLUMNS * self.bits // 8 :].view(torch.float16)

    def rows(self, selection: slice | torch.Tensor) -> QuantizedWeight:
        """Some rows as they were before packing (scales of one a row in fp32)."""
        ids = torch.arange(self.num_rows)[selection]
        block, row = ids // BLOCK_ROWS, ids % BLOCK_ROWS
        size = BLOCK_ROWS * GROUP_COLUMNS * self.bits // 8
        chosen = self.values[:, :, :size].unflatten(2, (self.bits, BLOCK_ROWS, 4))[block, :, :, row]
        if self.bits == 4:
            signed = torch.stack((chosen & 15, chosen >> 4), dim=2).to(torch.int8) - 8
        else:
            signed = (chosen ^ 128).view(torch.int8)
        signed = signed.flatten(1)[:, : self.num_columns]
        values = pack_int4(signed) if self.bits == 4 else signed.contiguous()
        scales = self.group_scales[block, :, row] if self.scales is None else self.scales[ids].unsqueeze(1)
        return QuantizedWeight(values, scales, self.bits, self.is_exact)

    def row_blocks(self) -> list[slice]:
        """Row ranges small enough that a dequantised block stays in the cache."""
        return row_blocks(self.num_rows, self.num_columns)


def packed_shape(weight: QuantizedWeight) -> tuple[int, int, int]:
    """The shape of `PackedWeight.values`."""
    num_blocks, num_groups = -(-weight.num_rows // BLOCK_ROWS), -(-weight.num_columns // GROUP_COLUMNS)
    scale_bytes = 2 * BLOCK_ROWS if weight.scales.shape[1] > 1 else 0
    return num_blocks, num_groups, BLOCK_ROWS * GROUP_COLUMNS * weight.bits // 8 + scale_bytes
