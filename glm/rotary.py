"""Rotary position embedding, as the originals' fp32 run computes it, in every precision.

ChatGLM-6B rotates the first half of a head by the position and the second by the block position, pairing element i
with i + quarter; its inverse frequencies are rounded to fp16 and then used exactly. All later families rotate the
first part of a head by the position and pair neighbours.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from glm.config import ModelConfig

_LEAST_POSITIONS = 2048


class RotaryTable(NamedTuple):
    """`cos` and `sin`, fp32, [num_tokens, 1, parts, pairs]: parts is 2 for two-dimensional positions, else 1."""

    cos: torch.Tensor
    sin: torch.Tensor


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """fp32 [pairs]: the angle a pair turns by from one position to the next.

    To divide positions by `rotary_scaling` is to divide these, as transformers does for its linear type.
    """
    width = config.rotary_dim // 2 if config.position_encoding_2d else config.rotary_dim
    return _inverse_frequencies(width, config.rotary_base, config.is_prefix_lm) / config.rotary_scaling


@cache
def _inverse_frequencies(width: int, base: float, is_prefix_lm: bool) -> torch.Tensor:
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / (base**exponent)
    return frequencies.to(torch.float16).to(torch.float32) if is_prefix_lm else frequencies


class Rotary:
    """The rotary tables of a model's tokens, for layers on one device.

    Rows are looked up in one table of all positions up to some, whatever is asked for beside them: computed anew, a
    cosine may have another last bit at the end of a vector than in the middle.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._num_parts = 2 if config.position_encoding_2d else 1
        self._frequencies = inverse_frequencies(config)
        self._device = device
        # [positions, 1, 1, pairs]
        self._cos = self._sin = torch.empty(0, 1, 1, len(self._frequencies))

    def table(self, positions: torch.Tensor) -> RotaryTable:
        """The table for token positions int64 [2, num_tokens] (see `positions.token_positions`)."""
        rows = positions[: self._num_parts].t().flatten()
        self._reach(int(rows.max()))
        return self._look_up(rows, positions.shape[1])

    def rows(self, positions: Sequence[tuple[int, int]]) -> RotaryTable:
        """The same for few tokens' position and block position, in less time."""
        wanted = [position for token in positions for position in token[: self._num_parts]]
        self._reach(last := max(wanted))
        if len(wanted) == 1:
            cos, sin = self._cos[last : last + 1], self._sin[last : last + 1]
            return RotaryTable(cos.to(self._device), sin.to(self._device))
        return self._look_up(torch.tensor(wanted), len(positions))

    def _look_up(self, rows: torch.Tensor, num_tokens: int) -> RotaryTable:
        shape = (num_tokens, 1, self._num_parts, -1)
        cos, sin = (table.index_select(0, rows).view(shape) for table in (self._cos, self._sin))
        return RotaryTable(cos.to(self._device), sin.to(self._device))

    def _reach(self, position: int) -> None:
        """Have rows up to a position; those that were there stay as they are."""
        start = len(self._cos)
        if position < start:
            return
        rows = torch.arange(start, max(_LEAST_POSITIONS, 1 << position.bit_length()), dtype=torch.float32)
        angles = (rows.unsqueeze(-1) * self._frequencies)[:, None, None]
        self._cos, self._sin = torch.cat((self._cos, angles.cos())), torch.cat((self._sin, angles.sin()))


def rotate_halves(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """ChatGLM-6B: x [num_tokens, num_heads, head_dim], the whole head rotated."""
    parts = table.cos.shape[2]
    pairs = x.to(torch.float32).view(*x.shape[:2], parts, 2, -1)
    first, second = pairs.unbind(-2)
    rotated = torch.stack((first * table.cos - second * table.sin, second * table.cos + first * table.sin), dim=-2)
    return rotated.view(x.shape).to(x.dtype)


def rotate_neighbours(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Later families: x [num_tokens, num_heads, head_dim], only the first 2 * pairs elements of a head rotated."""
    cos, sin = table.cos.squeeze(2), table.sin.squeeze(2)
    width = 2 * cos.shape[-1]
    even, odd = x[..., :width].to(torch.float32).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)
