"""Attention of the new tokens of each sequence over all of its keys."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from glm.errors import CacheGapError, SegmentError
from glm.kernels.native import CachedSequence, CacheView, NativeKernels
from glm.kv_cache import SequenceCache
from glm.positions import PromptLayout, token_position, token_positions, visible_keys
from glm.rotary import Rotary, RotaryTable

# Of all segments: their positions are told one by one, which takes less time.
_FEW_TOKENS = 16


class Segment(NamedTuple):
    """One sequence's share of a forward: `num_tokens` new tokens from `start_pos` on, where its cache ends."""

    cache: SequenceCache
    start_pos: int
    num_tokens: int
    layout: PromptLayout | None = None

    @property
    def num_visible(self) -> int:
        """How many of the first keys each token sees, though they may come later: the context of a prefix LM."""
        return 0 if self.layout is None else self.layout.context_length


class Geometry(NamedTuple):
    """What all layers of one forward share: rotary tables of all tokens, and who sees whom in each segment (which the
    native kernels know from `Segment` alone: None)."""

    segments: tuple[Segment, ...]
    rotary: RotaryTable
    visible: tuple[torch.Tensor | None, ...]
    kernels: NativeKernels | None = None

    def sequences(self, layer: int) -> list[CachedSequence]:
        """Where each segment's keys and values lie, from a layer of the range on."""
        return [_from_layer(segment, layer) for segment in self.segments]


def _from_layer(segment: Segment, layer: int) -> CachedSequence:
    cache = segment.cache
    sizes = (cache.capacity, segment.start_pos, segment.num_tokens, segment.num_visible)
    return CachedSequence(cache.places_from(layer), *sizes)


def _cache_view(segment: Segment, layer: int) -> CacheView:
    sizes = (segment.start_pos, segment.num_tokens, segment.num_visible)
    return CacheView(*segment.cache.tensors(layer), *sizes)


def make_geometry(
    segments: Sequence[Segment],
    rotary: Rotary,
    device: torch.device,
    kernels: NativeKernels | None = None,
) -> Geometry:
    """Compute positions, rotary tables and visibility once for all layers.

    Raises:
        CacheGapError: a segment does not start where its cache ends.
        SegmentError: a segment is empty, shares a cache with another, or cuts a prefix.
    """
    _check(segments)
    masks = [None if kernels else visible_keys(s.start_pos, s.num_tokens, s.layout) for s in segments]
    return Geometry(
        segments=tuple(segments),
        rotary=_rotary_table(segments, rotary),
        visible=tuple(None if mask is None else mask.to(device) for mask in masks),
        kernels=kernels,
    )


def _rotary_table(segments: Sequence[Segment], rotary: Rotary) -> RotaryTable:
    if sum([s.num_tokens for s in segments]) <= _FEW_TOKENS:
        places = [(at, s.layout) for s in segments for at in range(s.start_pos, s.start_pos + s.num_tokens)]
        return rotary.rows([token_position(at, layout) for at, layout in places])
    positions = [token_positions(s.start_pos, s.num_tokens, s.layout) for s in segments]
    return rotary.table(torch.cat(positions, dim=1))


def _check(segments: Sequence[Segment]) -> None:
    if len({id(segment.cache) for segment in segments}) < len(segments):
        raise SegmentError("two segments of one forward share a cache: give a sequence one segment only")
    for segment in segments:
        start, end, layout = segment.start_pos, segment.start_pos + segment.num_tokens, segment.layout
        if start != segment.cache.length:
            raise CacheGapError(f"a segment starts at position {start}, its cache holds {segment.cache.length} tokens")
        if end <= start:
            raise SegmentError(f"a segment has {segment.num_tokens} tokens: leave empty ones out")
        if layout is not None and start < layout.context_length and (start > 0 or end < layout.context_length):
            raise SegmentError(
                f"the first {layout.context_length} tokens of this prompt see each other both ways and must come in "
                f"one segment from 0, not cut to [{start}, {end})"
            )


def attend(geometry: Geometry, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Cache the new keys and values of one layer, then attend segment by segment.

    Args:
        layer: index into the caches, from the start of the layer range.
        query: [num_tokens, num_heads, head_dim], rotated; tokens of all segments one after the other.
        key, value: [num_tokens, num_kv_heads, head_dim], the key rotated.

    Returns:
        [num_tokens, num_heads * head_dim].
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if geometry.kernels is not None:
        geometry.kernels.attend(query, key, value, [_cache_view(s, layer) for s in geometry.segments], out)
        return out.flatten(1)
    start = 0
    for segment, visible in zip(geometry.segments, geometry.visible, strict=True):
        new = slice(start, start + segment.num_tokens)
        start = new.stop
        keys, values = segment.cache.write(layer, key[new], value[new])
        out[new] = _attend_one(query[new], keys, values, visible)
    return out.flatten(1)


def _attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    """query [n, heads, head_dim], keys and values [kv_heads, length, head_dim] -> [n, heads, head_dim].

    Query heads that share a key/value group become the heads of one batch entry, and the group is expanded, not
    copied.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_groups = keys.shape[0]
    shared = num_heads // num_groups
    grouped = query.view(num_tokens, num_groups, shared, head_dim).permute(1, 2, 0, 3)
    wide = (num_groups, shared, keys.shape[1], head_dim)
    context = functional.scaled_dot_product_attention(
        grouped, keys.unsqueeze(1).expand(wide), values.unsqueeze(1).expand(wide), attn_mask=visible
    )
    return context.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
