"""From one row of logits to the next token id."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glm.errors import SamplingError

# Candidates that are looked at before a whole vocabulary is sorted for top-p.
FEW = 512

# Below it the most likely token is all that is left, and dividing by it would overflow.
COLDEST = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends, beside the model's own end ids.

    Raises:
        SamplingError: values that are impossible; the message lists all of them.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy."""
    top_k: int = 0
    """Only the k most likely tokens (and those as likely as the last of them); 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability; 1 for all."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely one; 0 for all."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer less likely; 1 for no penalty."""
    seed: int | None = None
    """The same seed gives the same tokens; None for another answer each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    max_new_tokens: int | None = None
    """None for as many as the context holds."""
    ignore_eos: bool = False
    """Go on after the model's end ids, to get a fixed number of tokens."""
    greedy: bool = False
    """Always the most likely token."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, it must be {must}"
            for name, must, holds in _RULES
            if not holds(getattr(self, name))
        ]
        if faults:
            raise SamplingError("; ".join(faults))

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature < COLDEST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("temperature", "a number from 0 (greedy) up", lambda v: _is_number(v) and v >= 0),
    ("top_k", "a whole number from 0 (all tokens) up", lambda v: _is_whole(v) and v >= 0),
    ("top_p", "a number above 0 and up to 1 (all tokens)", lambda v: _is_number(v) and 0 < v <= 1),
    ("min_p", "a number from 0 (all tokens) to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    ("repetition_penalty", "a number from 0.01 to 100 (1 for none)", lambda v: _is_number(v) and 0.01 <= v <= 100),
    ("seed", "a whole number from 0 to 2^63 - 1, or none", lambda v: v is None or (_is_whole(v) and 0 <= v < 2**63)),
    (
        "stop",
        "texts that are not empty",
        lambda v: isinstance(v, tuple) and all(isinstance(text, str) and text for text in v),
    ),
    (
        "max_new_tokens",
        "a whole number from 1 up, or none",
        lambda v: v is None or (_is_whole(v) and v >= 1),
    ),
    ("ignore_eos", "true or false", lambda v: isinstance(v, bool)),
    ("greedy", "true or false", lambda v: isinstance(v, bool)),
)


class Sampler:
    """Chooses the tokens of one sequence, one after the other.

    The order of the rules is transformers': repetition penalty, temperature, top-k, top-p, min-p. What it does depends
    on the params, the logits and the ids chosen so far, on nothing else.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int] = (), *, guard_id: int = 0) -> None:
        self._params = params
        self._guard_id = guard_id
        self._not_yet_seen = list(prompt_ids)
        self._seen: Tensor | None = None
        self._generator = torch.Generator(device="cpu")
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._num_guarded = 0

    @property
    def num_guarded(self) -> int:
        """How often a score was NaN or infinite and the guard id was chosen: more than 0 means a broken model."""
        return self._num_guarded

    def sample(self, logits: Tensor) -> int:
        """The next token id. `logits`: [vocab_size], float32, on the CPU; left as they are."""
        token_id = self._choose(logits)
        if self._params.repetition_penalty != 1:
            self._not_yet_seen.append(token_id)
        return token_id

    def _choose(self, logits: Tensor) -> int:
        if not bool(torch.isfinite(logits).all()):
            self._num_guarded += 1
            return self._guard_id
        logits = self._penalise(logits)
        if self._params.is_greedy:
            return int(logits.argmax())
        token_ids, scores = candidates(logits, self._params)
        chosen = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
        return chosen if token_ids is None else int(token_ids[chosen])

    def _penalise(self, logits: Tensor) -> Tensor:
        penalty = self._params.repetition_penalty
        if penalty == 1:
            return logits
        if self._seen is None:
            self._seen = torch.zeros(logits.shape, dtype=torch.bool)
        self._seen[torch.tensor(self._not_yet_seen, dtype=torch.int64)] = True
        self._not_yet_seen.clear()
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        return torch.where(self._seen, penalised, logits)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor | None, Tensor]:
    """The tokens that temperature, top-k, top-p and min-p leave, with their scores.

    Args:
        logits: [vocab_size], float32, all finite.

    Returns:
        (token ids [n] int64, or None when they are 0, 1, 2, ...; scores [n] float32, to be made probabilities by a
        softmax). Where a rule cuts, the ids are ordered from the most likely one.
    """
    scores = (logits - logits.max()) / params.temperature
    token_ids = None
    if 0 < params.top_k < len(scores):
        token_ids, scores = _top_k(scores, params.top_k)
    if params.top_p < 1:
        token_ids, scores = _top_p(token_ids, scores, params.top_p)
    if params.min_p > 0:
        kept = scores >= scores.max() + math.log(params.min_p)
        token_ids = kept.nonzero().squeeze(-1) if token_ids is None else token_ids[kept]
        scores = scores[kept]
    return token_ids, scores


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top, token_ids = scores.topk(k)
    if int((scores >= top[-1]).sum()) == k:
        return token_ids, top
    # Others are as likely as the last one: all of them stay.
    token_ids = (scores >= top[-1]).nonzero().squeeze(-1)
    order = scores[token_ids].argsort(descending=True, stable=True)
    return token_ids[order], scores[token_ids[order]]


def _top_p(token_ids: Tensor | None, scores: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """A token stays when those more likely than it do not reach `top_p` yet; the most likely one always stays."""
    total = scores.logsumexp(dim=-1)
    if token_ids is not None:
        ordered_ids, ordered = token_ids, scores
    else:
        ordered, ordered_ids = scores.topk(min(FEW, len(scores)))
        if float((ordered - total).exp().sum()) < top_p:
            ordered, ordered_ids = scores.sort(descending=True, stable=True)
    probabilities = (ordered - total).exp()
    before = probabilities.cumsum(dim=-1) - probabilities
    num_kept = max(1, int((before < top_p).sum()))
    return ordered_ids[:num_kept], ordered[:num_kept]
