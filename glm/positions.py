"""Which position a token has and which keys it sees: both follow from a few integers.

ChatGLM-6B is a prefix LM with two-dimensional positions; every later family counts 0, 1, 2, ... and is causal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm.config import ModelConfig
from glm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """Where a ChatGLM-6B prompt keeps its marks.

    `context_length` is the index of the first bos token (`<sop>`): the tokens before it see each other both ways.
    `mask_position` is the index of the mask token, at which all tokens from bos on sit; None lets positions count on
    (only with one-dimensional positions and `[gMASK]`).
    """

    context_length: int
    mask_position: int | None


def prompt_layout(token_ids: Sequence[int], config: ModelConfig) -> PromptLayout | None:
    """The layout of a prompt, or None for causal families.

    `[MASK]` goes before `[gMASK]` when both are present: the published tokenizer passes positions by that rule, and
    so overrules the published model, which would take `[gMASK]`.

    Raises:
        ConfigError: a ChatGLM-6B prompt without bos token or without mask token.
    """
    if not config.is_prefix_lm:
        return None
    ids = list(token_ids)
    marks = [mark for mark in (config.mask_id, config.gmask_id) if mark in ids]
    if config.bos_id not in ids or not marks:
        raise ConfigError(
            f"a prompt of this family needs a mask token ({config.mask_id} or {config.gmask_id}) and then the token "
            f"{config.bos_id}; append both to the {len(ids)} ids given"
        )
    keeps_counting = not config.position_encoding_2d and marks[0] == config.gmask_id
    return PromptLayout(ids.index(config.bos_id), None if keeps_counting else ids.index(marks[0]))


def token_positions(start_pos: int, num_tokens: int, layout: PromptLayout | None) -> torch.Tensor:
    """int64 [2, num_tokens]: position and block position; causal families use the first row only."""
    index = torch.arange(start_pos, start_pos + num_tokens)
    if layout is None:
        return torch.stack((index, torch.zeros_like(index)))
    in_context = index < layout.context_length
    position = index if layout.mask_position is None else torch.where(in_context, index, layout.mask_position)
    return torch.stack((position, (index - layout.context_length + 1).clamp_(min=0)))


def token_position(at: int, layout: PromptLayout | None) -> tuple[int, int]:
    """Position and block position of one token, as `token_positions` has them."""
    if layout is None:
        return at, 0
    mask = layout.mask_position
    position = at if mask is None or at < layout.context_length else mask
    return position, max(0, at - layout.context_length + 1)


def visible_keys(start_pos: int, num_tokens: int, layout: PromptLayout | None) -> torch.Tensor | None:
    """bool [num_tokens, start_pos + num_tokens], true where a query may look; None when it may look everywhere."""
    num_keys = start_pos + num_tokens
    if num_tokens == 1:
        return None
    query = torch.arange(start_pos, num_keys).unsqueeze(1)
    key = torch.arange(num_keys).unsqueeze(0)
    visible = key <= query
    return visible if layout is None else visible | (key < layout.context_length)
