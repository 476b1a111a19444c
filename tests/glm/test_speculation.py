"""Speculation: drafts are real continuations, verification changes no answer, failing drafts cost little."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm.sampling import Sampler, SamplingParams
from glm.speculation import MAX_DRAFT, DraftLength, PromptLookup, StepCost, verify

FEW_IDS = st.lists(st.integers(0, 3), max_size=60)


@given(FEW_IDS, st.integers(0, 20), st.integers(1, 4), st.integers(0, 12))
def test_drafts_follow_what_was_said_before(ids: list[int], num: int, shortest: int, more: int) -> None:
    """Each draft token came after the same `shortest` tokens before, the draft itself included; there is none only
    if the end of the text never occurred before; and it follows the longest match, in its last occurrence."""
    drafted = PromptLookup(ids, longest=shortest + more, shortest=shortest).draft(num)
    assert len(drafted) in (0, num)
    text = ids + drafted
    for end in range(len(ids), len(text)):
        seen = {tuple(text[i : i + shortest + 1]) for i in range(end - shortest)}
        assert tuple(text[end - shortest : end + 1]) in seen
    end_is_old = any(ids[i : i + shortest] == ids[-shortest:] for i in range(len(ids) - shortest))
    assert bool(drafted) == (end_is_old and num > 0)


@given(FEW_IDS, st.integers(1, 8), st.integers(1, 20))
def test_the_longest_match_decides(ids: list[int], longest: int, num: int) -> None:
    """Of n-grams of `longest` tokens, half of it, ... 1, the longest that occurred before, where it did so last."""
    expected: list[int] = []
    n = longest
    while n and not expected:
        starts = [i + n for i in range(len(ids) - n) if ids[i : i + n] == ids[len(ids) - n :]]
        if starts:
            expected = ids[starts[-1] :]
        n //= 2
    drafted = PromptLookup(ids, longest=longest, shortest=1).draft(num)
    assert drafted[: len(expected)] == expected[:num]


@given(FEW_IDS, st.lists(st.integers(0, 60), max_size=4), st.integers(0, 9))
def test_it_does_not_matter_how_tokens_arrive(ids: list[int], cuts: list[int], num: int) -> None:
    """Extending piece by piece, with drafts asked for in between, equals the whole text at once."""
    lookup, start = PromptLookup(), 0
    for cut in [*sorted(cuts), len(ids)]:
        lookup.extend(ids[start:cut])
        lookup.draft(num)
        start = max(start, cut)
    assert lookup.draft(num) == PromptLookup(ids).draft(num)


def test_periodic_text_goes_on() -> None:
    """A draft longer than what is left of the text runs through its own continuation."""
    assert PromptLookup([1, 2, 3, 1, 2, 3, 1]).draft(8) == [2, 3, 1, 2, 3, 1, 2, 3]
    assert PromptLookup([5, 9, 9, 9]).draft(3) == [9, 9, 9]
    assert PromptLookup([1, 2, 3, 4]).draft(3) == []
    assert PromptLookup([1, 2, 7, 1, 2, 8, 1, 2]).draft(2) == [8, 1]


def table(num_tokens: int, seed: int) -> torch.Tensor:
    """A toy model: the logits [num_tokens, num_tokens] of what follows each token."""
    return torch.randn(num_tokens, num_tokens, generator=torch.Generator().manual_seed(seed)) * 1.5


def plain(model: torch.Tensor, params: SamplingParams, num: int) -> list[int]:
    sampler, ids = Sampler(params, [0]), [0]
    while len(ids) < num:
        ids.append(sampler.sample(model[ids[-1]]))
    return ids


def speculated(
    model: torch.Tensor, params: SamplingParams, num: int, draft: Callable[[list[int]], list[int]]
) -> tuple[list[int], int]:
    """The tokens, and how many of them were drafted."""
    sampler, ids, num_accepted = Sampler(params, [0]), [0], 0
    while len(ids) < num:
        drafted = draft(ids)[: num - len(ids) - 1]
        new = verify(sampler, model[torch.tensor([ids[-1], *drafted])], drafted)
        assert new[:-1] == drafted[: len(new) - 1]
        num_accepted += len(new) - 1
        ids += new
    return ids, num_accepted


def looked_up(ids: list[int]) -> list[int]:
    return PromptLookup(ids[-40:], shortest=1).draft(4)


PARAMS = [
    SamplingParams(greedy=True),
    SamplingParams(greedy=True, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, top_p=0.9, seed=5),
    SamplingParams(temperature=1.2, top_k=4, repetition_penalty=1.1, seed=6),
    SamplingParams(min_p=0.1, repetition_penalty=0.9, seed=7),
]


@pytest.mark.parametrize("params", PARAMS)
def test_equal_seeds_give_equal_answers(params: SamplingParams) -> None:
    """Drafts change no token: greedy or sampled, with penalties, whether they are good, random or absent."""
    model, noise = table(12, seed=1), random.Random(2)
    expected = plain(model, params, 150)
    for draft in (looked_up, lambda _: [noise.randrange(12) for _ in range(3)], lambda _: []):
        assert speculated(model, params, 150, draft)[0] == expected


def test_rows_after_the_last_token_are_not_sampled() -> None:
    """Neither after a draft token that does not hold nor after an end; the sampler and its random numbers stay where
    plain decoding leaves them."""
    model, params = table(12, seed=3), SamplingParams(seed=8)
    expected = plain(model, params, 30)[1:]

    def rows(ids: list[int]) -> Iterator[torch.Tensor]:
        for taken, token_id in enumerate(ids):
            assert taken <= 3, "a row was taken that does not count"
            yield model[token_id]

    wrong, seen = (expected[3] + 1) % 12, iter(range(9))
    for drafted, ends in (
        ([*expected[:3], wrong, expected[4]], lambda _: False),
        (expected[:6], lambda _: next(seen) == 3),
    ):
        sampler = Sampler(params, [0])
        assert verify(sampler, rows([0, *drafted]), drafted, ends) == expected[:4]
        assert [sampler.sample(model[token_id]) for token_id in expected[3:20]] == expected[4:21]


def chi_square(ids: list[int], probabilities: torch.Tensor) -> float:
    """How far what followed each token is from the probabilities; n * (n - 1) degrees of freedom for n tokens."""
    counts = torch.zeros_like(probabilities)
    for (before, after), count in Counter(pairwise(ids)).items():
        counts[before, after] = count
    expected = counts.sum(1, keepdim=True) * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


def test_sampled_answers_are_distributed_as_without_drafts() -> None:
    """Ten thousand tokens follow the model's own probabilities, a third of them drafted first; a verification that
    accepts drafts too often does not pass."""
    model = table(5, seed=4)
    ids, num_accepted = speculated(model, SamplingParams(seed=9), 10_000, looked_up)
    bound = 45.3  # 20 degrees of freedom: exceeded by chance once in a thousand
    assert num_accepted > 3000
    assert chi_square(ids, model.softmax(1)) < bound
    assert chi_square(plain(model, SamplingParams(seed=10), 10_000), model.softmax(1)) < bound

    class Gullible:
        """Accepts what it would sample in one of two attempts."""

        def __init__(self) -> None:
            self.sampler, self.hoped = Sampler(SamplingParams(seed=11)), 0

        def sample(self, logits: torch.Tensor) -> int:
            first = self.sampler.sample(logits)
            return first if first == self.hoped else self.sampler.sample(logits)

    gullible, wrong = Gullible(), [0]
    while len(wrong) < 10_000:
        drafted = looked_up(wrong)[:1] or [0]
        gullible.hoped = drafted[0]
        wrong += verify(gullible, model[torch.tensor([wrong[-1], *drafted])], drafted)
    assert chi_square(wrong, model.softmax(1)) > bound


def linear(slope: float) -> Callable[[int], float]:
    return lambda num_tokens: 1 + slope * (num_tokens - 1)


def speed(
    text: list[int], num_prompt: int, cost: Callable[[int], float], *, others: int = 0, noise: float = 0
) -> float:
    """How many times faster than plain decoding the rest of a text is, when steps cost that much; `noise` is that of
    the seconds that are observed, and one in twenty of them is far too long."""
    disturbance = random.Random(1)
    lookup, length, learned = PromptLookup(text[:num_prompt]), DraftLength(), StepCost()
    place, total = num_prompt, 0.0
    while place < len(text):
        num = length.choose(learned, others)
        drafted = lookup.draft(num)[: len(text) - place - 1]
        right = [a == b for a, b in zip(drafted, text[place:], strict=False)]
        num_accepted = [*right, False].index(False)
        step = cost(others + 1 + len(drafted))
        total += step
        outlier = 6 if noise and disturbance.random() < 0.05 else 1
        learned.observe(others + 1 + len(drafted), step * disturbance.lognormvariate(0, noise) * outlier)
        length.observe(len(drafted), num_accepted)
        lookup.extend(text[place : place + num_accepted + 1])
        place += num_accepted + 1
    return (len(text) - num_prompt) * cost(others + 1) / total


FAILING = [token_id for i in range(400) for token_id in (1, 2, 10 + i)]
"""Every third token is new, after two that occurred before: there is always a draft, and it never holds."""
REPEATED = [random.Random(5).randrange(10_000) for _ in range(300)] * 2


@pytest.mark.parametrize("noise", [0, 0.1])
@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("slope", [0.01, 0.06, 0.3])
def test_failing_drafts_cost_little(slope: float, others: int, noise: float) -> None:
    """At most 3 %, whether further tokens of a step are nearly free or dear, in answers of 900 tokens and of 150."""
    novel = [2 * i % 1201 + 1201 * (i % 2) for i in range(1200)]
    for text in (FAILING, FAILING[:450], novel):
        assert speed(text, 300, linear(slope), others=others, noise=noise) >= 1 / 1.03


@pytest.mark.parametrize("noise", [0, 0.1])
@pytest.mark.parametrize("others", [0, 3])
@pytest.mark.parametrize("slope", [0.01, 0.06])
def test_repeating_text_gets_faster(slope: float, others: int, noise: float) -> None:
    """An answer that repeats its prompt, whole or in stretches of 60 tokens between 60 new ones."""
    assert speed(REPEATED, 300, linear(slope), others=others, noise=noise) > 3
    stretches = REPEATED[:300]
    for i in range(5):
        stretches = [*stretches, *REPEATED[50 * i : 50 * i + 60], *range(20_000 + 60 * i, 20_060 + 60 * i)]
    assert speed(stretches, 300, linear(slope), others=others, noise=noise) > 1.5


def test_steps_that_cost_as_much_as_their_tokens_are_not_used() -> None:
    """Where each further token costs a whole step nothing is gained, and nearly nothing is lost."""
    assert speed(REPEATED, 300, linear(1.0)) >= 0.97
    assert speed(FAILING, 300, linear(1.0)) >= 0.97


def test_drafts_come_back_quickly() -> None:
    """After a thousand failures no more than a dozen steps pass until a draft is tried, and after two that hold they
    are longer."""
    length, cost = DraftLength(), StepCost()
    for num_tokens in range(1, 18):
        cost.observe(num_tokens, linear(0.06)(num_tokens))
    for _ in range(1000):
        length.observe(length.choose(cost), 0)
    chosen = [length.choose(cost) for _ in range(12)]
    assert any(chosen)
    for _ in range(2):
        while not (num := length.choose(cost)):
            pass
        length.observe(num, num)
    assert length.choose(cost) >= 3


def test_a_hopeless_sequence_beside_others_is_left_alone() -> None:
    """The dearer a step gets by one more token, the more seldom it is tried; a draft that cannot pay is never tried."""

    def tries(slope: float) -> int:
        length, cost = DraftLength(), StepCost()
        for num_tokens in range(1, 40):
            cost.observe(num_tokens, linear(slope)(num_tokens))
        num = 0
        for _ in range(1000):
            chosen = length.choose(cost)
            num += chosen > 0
            length.observe(chosen, 0)
        return num

    assert tries(0.01) > tries(0.1) > tries(0.6) > 0
    assert tries(1.0) <= 3


def test_unseen_sizes_are_judged_hopefully() -> None:
    """Before any step only little is assumed of a token's cost; beyond what was seen the cost rises half as fast."""
    cost = StepCost()
    assert DraftLength().choose(cost) > 0
    cost.observe(1, 2.0)
    assert cost.of(1) == pytest.approx(2.0)
    assert 2.0 < cost.of(17) < 3.0
    cost.observe(5, 4.0)
    assert cost.of(3) == pytest.approx(3.0)
    assert cost.of(9) == pytest.approx(5.0)


@given(st.lists(st.tuples(st.integers(0, 40), st.just(0.0) | st.floats(1e-12, 100)), max_size=60))
def test_costs_never_fall_with_the_size(steps: list[tuple[int, float]]) -> None:
    """Whatever was observed: costs are positive and rise."""
    cost = StepCost()
    for num_tokens, seconds in steps:
        cost.observe(num_tokens, seconds)
    costs = [cost.of(n) for n in range(1, 60)]
    assert costs[0] > 0
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(costs))


def test_costs_are_learned_through_noise_and_drift() -> None:
    """Ratios come within a tenth of the truth although one step in twenty takes six times as long; when everything gets
    twice as slow, sizes that are not tried follow those that are."""
    noise, cost, truth = random.Random(6), StepCost(), linear(0.1)
    for i in range(600):
        num_tokens = (1, 2, 5, 1, 9)[i % 5]
        cost.observe(num_tokens, truth(num_tokens) * noise.lognormvariate(0, 0.1) * (6 if noise.random() < 0.05 else 1))
    for num_tokens in (2, 5, 9):
        assert cost.of(num_tokens) / cost.of(1) == pytest.approx(truth(num_tokens), rel=0.1)
    before = cost.of(9)
    for _ in range(100):
        cost.observe(1, 2.0)
    assert cost.of(1) == pytest.approx(2.0, rel=0.1)
    assert cost.of(9) > 1.4 * before


def test_a_size_that_was_slow_once_is_tried_again() -> None:
    """One bad measurement does not shut drafts out for good."""
    cost = StepCost()
    cost.observe(1, 1.0)
    cost.observe(2, 100.0)
    assert DraftLength().choose(cost) == 0
    for _ in range(300):
        cost.observe(1, 1.0)
    assert DraftLength().choose(cost) > 0


def test_longest_draft() -> None:
    """A sequence that repeats itself gets the longest drafts, never longer ones."""
    length, cost = DraftLength(), StepCost()
    for num_tokens in range(1, 40):
        cost.observe(num_tokens, linear(0.01)(num_tokens))
    for _ in range(20):
        num = length.choose(cost)
        length.observe(num, num)
    assert length.choose(cost) == MAX_DRAFT
    assert DraftLength(max_draft=3).choose(cost) <= 3
