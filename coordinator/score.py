"""How likely a model finds a text: cut into windows that overlap, each of the text's tokens counted once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from glm.logprobs import TokenLogprob, perplexity, total_logprob

if TYPE_CHECKING:
    from glm.tokenizer import Tokenizer

DEFAULT_WINDOW = 2048
"""Tokens, the model's prefix included; fewer where the context is shorter."""


class Scorer(Protocol):
    """A model that tells how likely it finds token ids; `ChatModel` is one."""

    def score(self, token_ids: AbstractSequence[int], *, num_prompt: int | None = None) -> list[TokenLogprob]:
        """One for each id but the first, in order; a prefix LM's for those behind its prompt of `num_prompt` ids.

        Raises:
            GenerationError: the model cannot take them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) of a text are fed, those from `first_scored` on count."""

    start: int
    first_scored: int
    end: int


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a text, by position from 0; `num_context` tokens were fed before it, prefix included."""

    position: int
    logprob: TokenLogprob
    num_context: int


@dataclass(frozen=True, slots=True)
class TextScore:
    """What a whole text came to. `logprob` is the sum, in nats; `scored_tokens` lacks those that nothing stood before.

    Bits are per byte of UTF-8 and per character of the text.
    """

    tokens: int
    scored_tokens: int
    windows: int
    logprob: float
    perplexity: float
    bytes: int
    characters: int
    bits_per_token: float
    bits_per_byte: float
    bits_per_character: float


def windows(num_tokens: int, size: int, stride: int, first_scored: int = 0) -> Iterator[Window]:
    """Cut `num_tokens` into windows of `size`, each `stride` further on than the one before.

    Every token from `first_scored` on counts in the first window that holds it: those of the first window with
    whatever stands before them, all later ones with at least `size - stride` tokens of the text before them.
    """
    if not 0 < stride <= size:
        raise ValueError(f"windows of {size} tokens cannot advance by {stride}")
    start, counted = 0, first_scored
    while counted < num_tokens:
        end = min(start + size, num_tokens)
        yield Window(start, counted, end)
        start, counted = start + stride, end


def score_tokens(
    scorer: Scorer, prefix: AbstractSequence[int], token_ids: AbstractSequence[int], window: int, stride: int
) -> Iterator[list[ScoredToken]]:
    """Score a text's tokens, window by window, with the model's own prefix (`[gMASK]` and its like) before each.

    Without a prefix the text's first token has nothing before it, and is left out.

    Args:
        window: tokens of the text fed at once. `stride` is less than that where there is no prefix.
    """
    for cut in windows(len(token_ids), window, stride, 0 if prefix else 1):
        logprobs = scorer.score((*prefix, *token_ids[cut.start : cut.end]), num_prompt=len(prefix) or None)
        scored = logprobs[len(logprobs) - (cut.end - cut.first_scored) :]
        yield [
            ScoredToken(position, logprob, len(prefix) + position - cut.start)
            for position, logprob in enumerate(scored, start=cut.first_scored)
        ]


def token_fields(scored: ScoredToken, tokenizer: Tokenizer) -> str:
    """The line of a token: what it stands for, and `logprob`, null for minus infinity."""
    token_id, logprob = scored.logprob.token_id, scored.logprob.logprob
    fields = {
        "position": scored.position,
        "token_id": token_id,
        "text": tokenizer.piece(token_id).data.decode("utf-8", "replace"),
        "logprob": logprob if math.isfinite(logprob) else None,
        "context_tokens": scored.num_context,
    }
    return json.dumps(fields, ensure_ascii=False) + "\n"


def summarise(text: str, num_tokens: int, num_windows: int, logprobs: AbstractSequence[TokenLogprob]) -> TextScore:
    """Everything that is told of a text. `logprobs` must not be empty."""
    logprob = total_logprob(logprobs)
    bits, num_bytes = -logprob / math.log(2), len(text.encode())
    return TextScore(
        tokens=num_tokens,
        scored_tokens=len(logprobs),
        windows=num_windows,
        logprob=logprob,
        perplexity=perplexity(logprobs),
        bytes=num_bytes,
        characters=len(text),
        bits_per_token=bits / len(logprobs),
        bits_per_byte=bits / num_bytes,
        bits_per_character=bits / len(text),
    )
