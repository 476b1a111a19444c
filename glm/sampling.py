"""From one row of logits to the next token id."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from glm.sampling_params import SamplingParams

__all__ = ["Sampler", "SamplingParams", "candidates"]

# Candidates that are looked at before a whole vocabulary is sorted for top-p.
FEW = 512


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
        """How often a score was NaN or infinite, or so large that a penalty made it infinite, and the guard id was
        chosen: more than 0 means a broken model."""
        return self._num_guarded

    def sample(self, logits: Tensor) -> int:
        """The next token id. `logits`: [vocab_size], float32, on the CPU; left as they are."""
        token_id = self._choose(logits)
        if self._params.repetition_penalty != 1:
            self._not_yet_seen.append(token_id)
        return token_id

    def _choose(self, logits: Tensor) -> int:
        # A sum is taken in a tenth of the time, and is finite only if all of them are; finite ones may overflow it.
        if not math.isfinite(float(logits.sum())) and not bool(torch.isfinite(logits).all()):
            return self._guard()
        logits = self._penalise(logits)
        # A penalty is a factor: of a huge score it makes an infinite one. Some of -inf are tokens without a chance.
        if self._params.repetition_penalty != 1 and not math.isfinite(float(logits.max())):
            return self._guard()
        if self._params.is_greedy:
            return int(logits.argmax())
        token_ids, scores = candidates(logits, self._params)
        chosen = int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
        return chosen if token_ids is None else int(token_ids[chosen])

    def _guard(self) -> int:
        self._num_guarded += 1
        return self._guard_id

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
