"""Log-probabilities of tokens: what the model itself thought of them, before temperature and every other rule.

Nothing heavy is imported before there are scores: clients without a model use `TokenLogprob`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOP = 20
"""Alternatives that may be asked for of each token."""
ROWS_AT_ONCE = 16
"""Bounds the memory of the sums, which are in double precision."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural log-probability, and the `(token id, log-probability)` of the most likely ones, best first.

    Where the model's scores are broken (NaN, or infinite upwards) `logprob` is -inf, never NaN, and `top` is empty. A
    single score of -inf is no fault: that token has probability 0.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(logits: Tensor, token_ids: AbstractSequence[int], num_top: int = 0) -> list[TokenLogprob]:
    """The log-probability of one token a row, under a softmax of the scores as they are.

    Args:
        logits: [n, vocab_size], float32, on any device; left as they are.
        token_ids: n ids, below vocab_size.
        num_top: how many of the most likely tokens to name; as likely ones come by id.
    """
    if len(token_ids) != len(logits):
        raise ValueError(f"{len(logits)} rows of scores for {len(token_ids)} tokens")
    found: list[TokenLogprob] = []
    for start in range(0, len(token_ids), ROWS_AT_ONCE):
        ids = token_ids[start : start + ROWS_AT_ONCE]
        found += _block(logits[start : start + len(ids)], ids, min(num_top, logits.shape[-1]))
    return found


def total_logprob(logprobs: Iterable[TokenLogprob]) -> float:
    """Of all of them together, summed without rounding in between."""
    return math.fsum(each.logprob for each in logprobs)


def perplexity(logprobs: AbstractSequence[TokenLogprob]) -> float:
    """exp of the mean negative log-probability: 1 is certainty; infinite where a token had no chance at all.

    Raises:
        ValueError: there are no tokens.
    """
    if not logprobs:
        raise ValueError("no tokens have no perplexity")
    mean = -total_logprob(logprobs) / len(logprobs)
    try:
        return math.exp(mean)
    except OverflowError:
        return math.inf


def _block(logits: Tensor, token_ids: AbstractSequence[int], num_top: int) -> list[TokenLogprob]:
    from torch import tensor

    totals = logits.double().logsumexp(-1, keepdim=True)  # not finite if any score is NaN or +inf, or none is finite
    chosen = logits.gather(-1, tensor(list(token_ids), device=logits.device).unsqueeze(-1)) - totals
    scores, ids = logits.topk(num_top, dim=-1)
    rows = zip(
        token_ids,
        totals.squeeze(-1).isfinite().tolist(),
        chosen.squeeze(-1).tolist(),
        ids.tolist(),
        (scores - totals).tolist(),
        strict=True,
    )
    return [
        TokenLogprob(int(token_id), logprob, _ordered(top_ids, top))
        if sound
        else TokenLogprob(int(token_id), -math.inf)
        for token_id, sound, logprob, top_ids, top in rows
    ]


def _ordered(ids: Iterable[int], logprobs: Iterable[float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(zip(ids, logprobs, strict=True), key=lambda each: (-each[1], each[0])))
