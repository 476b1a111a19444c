"""Decoding several tokens at once without a second model: what a text said before is guessed to come again.

A draft, some tokens that may follow, goes through the layers together with the last token, in one step. A step of a
few tokens costs little more than one of a single token, for the weights are read once; each draft token that turns out
to be right saves a step. Who drafts (`PromptLookup`), what a step costs (`StepCost`), how many tokens are worth
drafting (`DraftLength`) and which of them hold (`verify`): four things, and no clock.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

MAX_DRAFT = 16
"""Longest draft in tokens."""

_ID_BITS = 24


class PromptLookup:
    """Drafts for one sequence out of its own token ids, prompt and answer.

    The last `longest` tokens are looked up, or half of them, or a quarter, down to `shortest`: of these n-grams the
    longest one that occurred before says what followed it the last time, and that is the draft. A draft that reaches
    the end of the text goes on with itself: after "ab ab a" comes "b ab ab ...".

    However long the text is, a token costs about a microsecond and less than a kilobyte, and a draft two microseconds.
    """

    def __init__(self, token_ids: Iterable[int] = (), *, longest: int = 16, shortest: int = 2) -> None:
        assert 1 <= shortest <= longest
        self._ids: list[int] = []
        self._end = 0
        """The last `longest` ids, as one number."""
        self._masks = [(n, (1 << _ID_BITS * n) - 1) for n in _halvings(longest, shortest)]
        self._follows: list[dict[int, int]] = [{} for _ in self._masks]
        """For each length, longest first: n-gram -> where the token after its last occurrence stands."""
        self.extend(token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Tokens that now belong to the sequence: its prompt, later those that were chosen."""
        ids, end = self._ids, self._end
        tables = [(n, mask, follows) for (n, mask), follows in zip(self._masks, self._follows, strict=True)]
        whole = self._masks[0][1]
        for token_id in token_ids:
            place = len(ids)
            for n, mask, follows in tables:
                if n <= place:
                    follows[end & mask] = place
            ids.append(token_id)
            end = (end << _ID_BITS | token_id) & whole
        self._end = end

    def draft(self, num_tokens: int) -> list[int]:
        """At most `num_tokens` ids that may come next; none if the end of the text is new."""
        ids = self._ids
        for (n, mask), follows in zip(self._masks, self._follows, strict=True):
            start = follows.get(self._end & mask) if n <= len(ids) else None
            if start is not None:
                found = ids[start : start + num_tokens]
                return [found[i % len(found)] for i in range(num_tokens)] if found else []
        return []


def _halvings(longest: int, shortest: int) -> list[int]:
    lengths = [longest]
    while lengths[-1] > shortest:
        lengths.append(max(shortest, lengths[-1] // 2))
    return lengths


@dataclass(slots=True)
class _Seen:
    """What is known of one size: the logarithm of its cost over the common level, and how far to trust it."""

    log_ratio: float
    weight: float


class StepCost:
    """What a step of so many tokens costs, in seconds, learned from steps that were taken.

    A common level follows what all sizes share (contexts grow, a machine gets busy) and a ratio for each size says how
    it stands to the others. Both are averages that forget, of logarithms, and a single step moves them by a bounded
    amount, however long it took. Between the sizes seen the cost is interpolated, and it never falls with the size.
    Beyond them it rises half as fast as it did so far: rather too hopeful, so that a larger size is tried once.
    """

    _LEVEL_RATE = 0.1
    _RATIO_RATE = 0.05
    _FORGET = 0.995
    _MOST_SURPRISE = math.log(1.3)
    _MOST_FIRST_SURPRISE = math.log(4)
    _LEAST_SLOPE = 0.03
    _MOST_WEIGHT = 20.0

    def __init__(self) -> None:
        self._level = 0.0
        self._seen: dict[int, _Seen] = {}
        self._curve: list[tuple[int, float]] = []
        self._known: dict[int, float] = {}

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` tokens took `seconds`; steps of no tokens or no time are left out."""
        if num_tokens < 1 or not 0 < seconds < math.inf:
            return
        if not self._seen:
            self._level = math.log(seconds)
        seen = self._seen.get(num_tokens)
        expected = math.log(self.of(num_tokens)) if self._seen else self._level
        if seen is None:
            surprise = _bounded(math.log(seconds) - expected, self._MOST_FIRST_SURPRISE)
            self._seen[num_tokens] = _Seen(expected + surprise - self._level, 1.0)
        else:
            surprise = _bounded(math.log(seconds) - self._level - seen.log_ratio, self._MOST_SURPRISE)
            self._level += self._LEVEL_RATE * surprise
            seen.weight = min(seen.weight + 1, self._MOST_WEIGHT)
            seen.log_ratio += max(1 / seen.weight, self._RATIO_RATE) * surprise
        self._forget(num_tokens)

    def of(self, num_tokens: int) -> float:
        """Seconds; 1 for everything before the first step was seen (only ratios matter)."""
        cost = self._known.get(num_tokens)
        if cost is None:
            cost = self._known[num_tokens] = math.exp(self._level) * self._relative(num_tokens)
        return cost

    def _forget(self, but: int) -> None:
        """Sizes that were not tried for long are forgotten: they get another chance."""
        for size, seen in list(self._seen.items()):
            if size != but:
                seen.weight *= self._FORGET
                if seen.weight < 0.5:
                    del self._seen[size]
        self._known.clear()
        self._curve = _rising(sorted((size, math.exp(s.log_ratio), s.weight) for size, s in self._seen.items()))

    def _relative(self, num_tokens: int) -> float:
        curve = self._curve
        if not curve:
            return 1 + self._LEAST_SLOPE * (num_tokens - 1)
        right = bisect_left(curve, (num_tokens, 0.0))
        if 0 < right < len(curve):
            (x0, y0), (x1, y1) = curve[right - 1], curve[right]
            return y0 + (y1 - y0) * (num_tokens - x0) / (x1 - x0)
        (first, least), (last, most) = curve[0], curve[-1]
        if num_tokens <= first:
            return least / (1 + self._LEAST_SLOPE * (first - num_tokens))
        learned = (most - least) / (last - first) / 2 if last > first else 0.0
        return most + max(self._LEAST_SLOPE * least, learned) * (num_tokens - last)


def _bounded(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


def _rising(points: list[tuple[int, float, float]]) -> list[tuple[int, float]]:
    """(x, y, weight) by x -> (x, y) where y never falls: neighbours that do get their weighted mean."""
    groups: list[tuple[list[int], float, float]] = []
    for x, y, weight in points:
        group = ([x], y, weight)
        while groups and groups[-1][1] > group[1]:
            xs, other, other_weight = groups.pop()
            total = other_weight + group[2]
            group = (xs + group[0], (other * other_weight + group[1] * group[2]) / total, total)
        groups.append(group)
    return [(x, y) for xs, y, _ in groups for x in xs]


class DraftLength:
    """How many tokens to draft for one sequence, each time; one object for each sequence.

    The share of draft tokens that hold is estimated from the latest drafts; from it and the cost of steps follows how
    many tokens a second each length gives, and the best one is taken. Where drafts do not pay, only now and then a
    single token is drafted, to see whether that changed: ever more seldom while it fails, down to where these attempts
    cost at most `_PROBE_SHARE` of the time.
    """

    _PROBE_SHARE = 0.01
    _LEAST_GAIN = 1.02
    _DECAY = 0.6
    _MOST_TRIALS = 8.0
    _PRIOR_HITS, _PRIOR_TRIALS = 0.5, 1.0

    def __init__(self, max_draft: int = MAX_DRAFT) -> None:
        self._max_draft = max_draft
        self._hits = 0.0
        self._trials = 0.0
        self._num_failed = 0
        self._pause = 0

    @property
    def acceptance(self) -> float:
        """How likely the next draft token holds if all before it did, as far as known."""
        return (self._hits + self._PRIOR_HITS) / (self._trials + self._PRIOR_TRIALS + self._num_failed)

    def choose(self, cost: StepCost, other_tokens: int = 0) -> int:
        """How many tokens to draft for the next step, 0 to `max_draft`. Called once for each step of the sequence.

        Args:
            other_tokens: of the other sequences in the same step; each counts as one that comes out of it, too.
        """
        plain = cost.of(other_tokens + 1)
        best = self._best(cost, other_tokens, plain)
        if best:
            return best
        if self._pause > 0:
            self._pause -= 1
            return 0
        extra = cost.of(other_tokens + 2) / plain - 1
        cheap_pause = math.ceil(extra / self._PROBE_SHARE)
        self._pause = min(2 ** min(self._num_failed, 20), cheap_pause)
        # Where even a token that surely holds is not worth its cost, there is nothing to find out.
        return 1 if (other_tokens + 2) / (other_tokens + 1) > (1 + extra) * self._LEAST_GAIN else 0

    def _best(self, cost: StepCost, other_tokens: int, plain: float) -> int:
        """The length that gives the most tokens a second, 0 if none is worth it."""
        best, best_rate = 0, self._LEAST_GAIN * (other_tokens + 1) / plain
        expected, chance, acceptance = float(other_tokens + 1), 1.0, self.acceptance
        for k in range(1, self._max_draft + 1):
            chance *= acceptance
            expected += chance
            rate = expected / cost.of(other_tokens + 1 + k)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Of a draft of `num_drafted` tokens the first `num_accepted` held; without a draft nothing is learned."""
        if not num_drafted:
            return
        tried = num_accepted + (num_accepted < num_drafted)
        self._hits = self._DECAY * self._hits + num_accepted
        self._trials = self._DECAY * self._trials + tried
        if self._trials > self._MOST_TRIALS:
            self._hits *= self._MOST_TRIALS / self._trials
            self._trials = self._MOST_TRIALS
        self._num_failed = 0 if num_accepted else self._num_failed + 1


class Chooser(Protocol):
    """What `glm.sampling.Sampler` is."""

    def sample(self, logits: Tensor) -> int:
        """From [vocab_size] to a token id."""


def verify(
    sampler: Chooser, rows: Iterable[Tensor], drafted: Sequence[int], ends: Callable[[int], bool] = lambda _: False
) -> list[int]:
    """The tokens that a step with a draft gives: those of the draft that hold, and the one after them.

    Row i of the logits is what plain decoding would sample from if the first i draft tokens had been chosen. So a token
    is sampled from each row as plain decoding does; as long as it is the one that was drafted, the next row is right,
    too. Later rows follow from tokens that were not chosen, and nobody looks at them.

    That is rejection sampling: a draft is a distribution with all its weight on one token. It is accepted with the
    probability that the model gives it; otherwise the token comes from the others, in proportion to their
    probabilities. Sampling once from the row does both. And since each row that counts takes what plain decoding would
    have taken of the sampler's random numbers, and the sampler sees the same tokens (repetition penalty), equal seeds
    give equal answers with and without drafts, as far as a step of several tokens computes the same logits.

    Args:
        rows: [1 + len(drafted), vocab_size] float32, or one row after the other, each taken when it is needed.
        ends: called once with each token, in order; true if the sequence ends with it, and nothing after it is taken.

    Returns:
        1 to 1 + len(drafted) token ids; all but the last are the draft's first ones.
    """
    tokens: list[int] = []
    for i, row in enumerate(rows):
        token_id = sampler.sample(row)
        tokens.append(token_id)
        if ends(token_id) or i == len(drafted) or token_id != drafted[i]:
            break
    return tokens
