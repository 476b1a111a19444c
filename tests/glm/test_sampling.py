"""Choosing the next token: equal to transformers' rules, reproducible, and robust against broken scores."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from glm.errors import SamplingError
from glm.sampling import Sampler, SamplingParams, candidates
from glm.sampling_params import seed_after


def oracle(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """Probabilities [vocab] that transformers' own processors lead to, in its order."""
    rules: list[logits_process.LogitsProcessor] = []
    if params.repetition_penalty != 1:
        rules.append(logits_process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    rules.append(logits_process.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        rules.append(logits_process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        rules.append(logits_process.TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        rules.append(logits_process.MinPLogitsWarper(params.min_p))
    scores = logits[None].clone()
    for rule in rules:
        scores = rule(torch.tensor([seen], dtype=torch.int64), scores)
    return scores[0].softmax(dim=-1)


def probabilities(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """Probabilities [vocab] that the sampler draws from."""
    penalised = Sampler(params, seen)._penalise(logits)
    token_ids, scores = candidates(penalised, params)
    result = torch.zeros(len(logits))
    result[torch.arange(len(logits)) if token_ids is None else token_ids] = scores.softmax(dim=-1)
    return result


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.8, 0.31, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
)


@settings(max_examples=150, deadline=None)
@given(params=PARAMS, seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 8.0]), vocab=st.just(2000))
def test_equal_to_transformers(params: SamplingParams, seed: int, spread: float, vocab: int) -> None:
    """The same tokens stay, with the same probabilities, as transformers' processors in transformers' order."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * spread
    seen = torch.randint(vocab, (20,), generator=generator).tolist()
    torch.testing.assert_close(probabilities(logits, params, seen), oracle(logits, params, seen), atol=2e-6, rtol=1e-4)


def test_ties_at_the_top_k_border_all_stay() -> None:
    """Tokens as likely as the last of the k are kept, as in transformers."""
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    params = SamplingParams(top_k=2, top_p=0.9)
    torch.testing.assert_close(probabilities(logits, params, []), oracle(logits, params, []))


def test_a_flat_distribution_needs_the_whole_vocabulary() -> None:
    """Top-p beyond the few likeliest tokens is still exact."""
    logits = torch.linspace(0, 0.001, 30_000)
    params = SamplingParams(top_p=0.5)
    kept = probabilities(logits, params, []) > 0
    expected = oracle(logits, params, []) > 0
    assert abs(int(kept.sum()) - int(expected.sum())) <= 2  # sums of 15,000 floats in two orders


def test_greedy_is_the_most_likely_token() -> None:
    """By name, by temperature 0, and next to it; the penalty still counts; logits stay as they are."""
    logits = torch.tensor([0.0, 3.0, 2.9])
    for params in (SamplingParams(greedy=True), SamplingParams(temperature=0), SamplingParams(temperature=1e-30)):
        assert Sampler(params).sample(logits) == 1
    sampler = Sampler(SamplingParams(greedy=True, repetition_penalty=1.5), [0])
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 1]
    assert logits.tolist() == pytest.approx([0.0, 3.0, 2.9])


def test_the_prompt_is_penalised() -> None:
    """Transformers' rule: tokens of the prompt count as repeated, negative scores are multiplied."""
    params = SamplingParams(greedy=True, repetition_penalty=2.0)
    assert Sampler(params, [1]).sample(torch.tensor([2.0, 2.5])) == 0
    assert Sampler(params, [0]).sample(torch.tensor([-1.0, -1.5])) == 1


def draw(params: SamplingParams, num: int = 60) -> list[int]:
    sampler, generator = Sampler(params), torch.Generator().manual_seed(1)
    return [sampler.sample(torch.randn(1000, generator=generator)) for _ in range(num)]


def test_a_seed_gives_the_same_tokens() -> None:
    """Equal seeds agree, other seeds and no seed do not; other generators are left alone."""
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7)
    state = torch.random.get_rng_state()
    assert draw(params) == draw(params)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert draw(params) != draw(SamplingParams(temperature=1.0, top_p=0.9, seed=8))
    assert draw(SamplingParams()) != draw(SamplingParams())


def test_frequencies_follow_the_probabilities() -> None:
    """Ten thousand draws of a known distribution come near it."""
    sampler = Sampler(SamplingParams(top_k=3, seed=3))
    logits = torch.tensor([0.5, 0.3, 0.2, 1e-9]).log()
    counts = torch.bincount(torch.tensor([sampler.sample(logits) for _ in range(10_000)]), minlength=4)
    assert counts.tolist() == pytest.approx([5000, 3000, 2000, 0], abs=200)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("params", [SamplingParams(greedy=True), SamplingParams(top_p=0.5, seed=1)])
def test_broken_scores_give_the_guard_id(broken: float, params: SamplingParams) -> None:
    """One NaN or infinite score gives the published fallback, and it is counted."""
    sampler, logits = Sampler(params, guard_id=5), torch.zeros(10)
    logits[3] = broken
    assert sampler.sample(logits) == 5
    assert sampler.num_guarded == 1
    assert sampler.sample(torch.arange(10.0) * 100) == 9
    assert sampler.num_guarded == 1


def test_extreme_params_still_give_a_token() -> None:
    """Large logits, a cold temperature and the smallest top-p do not overflow."""
    logits = torch.tensor([-3e38, 0.0, 3e38])
    for params in (
        SamplingParams(temperature=1e-5),
        SamplingParams(temperature=2e-5, top_k=2, top_p=1e-9, min_p=1.0),
        SamplingParams(temperature=100, repetition_penalty=100),
    ):
        assert Sampler(params, [2]).sample(logits) in (0, 1, 2)


def test_impossible_values_are_listed_at_once() -> None:
    """One error names each of them, its value, and what is allowed."""
    with pytest.raises(SamplingError) as caught:
        SamplingParams(
            temperature=-1,
            top_k=-1,
            top_p=0,
            min_p=1.5,
            repetition_penalty=float("nan"),
            seed=-1,
            stop=("",),
            max_new_tokens=0,
            greedy=1,  # type: ignore[arg-type]
        )
    message = str(caught.value)
    for fault in ("temperature is -1", "top_k is -1", "top_p is 0", "min_p is 1.5", "repetition_penalty is nan"):
        assert fault in message
    for fault in ("seed is -1", "stop is ('',)", "max_new_tokens is 0", "greedy is 1"):
        assert fault in message


@pytest.mark.parametrize("huge", [1e38, 3e38])
@pytest.mark.parametrize("penalty", [0.01, 0.5, 100])
@pytest.mark.parametrize("params", [{"greedy": True}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1, "top_p": 0.9}])
def test_scores_that_a_penalty_makes_infinite_give_the_guard_id(
    huge: float, penalty: float, params: dict[str, Any]
) -> None:
    """Finite ones, of either sign, that overflow once they are penalised: a token each time, never an error."""
    for sign in (1, -1):
        sampler = Sampler(SamplingParams(repetition_penalty=penalty, seed=1, **params), range(8), guard_id=5)
        token_id = sampler.sample(torch.full((8,), sign * huge))
        overflows = huge / penalty > 3.4e38 if sign > 0 else huge * penalty > 3.4e38
        assert sampler.num_guarded == overflows
        assert token_id == 5 or not overflows


PARAMS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-5, 1.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 3, 2**31 - 1]),
        "top_p": st.sampled_from([5e-324, 1e-9, 0.5, 1.0]),
        "min_p": st.sampled_from([0.0, 5e-324, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.01, 0.9, 1.0, 100.0]),
    }
)
SCORES = st.floats(width=32) | st.sampled_from([3.4e38, -3.4e38, 1e-45, 0.0, float("inf"), float("-inf"), float("nan")])


@given(scores=st.lists(SCORES, min_size=1, max_size=8), params=PARAMS)
def test_any_scores_and_params_give_a_token(scores: list[float], params: dict[str, Any]) -> None:
    """Whatever a model says and whatever a user wishes within the bounds: one of the tokens there are."""
    sampler = Sampler(SamplingParams(seed=1, **params), range(len(scores)))
    for _ in range(2):
        assert 0 <= sampler.sample(torch.tensor(scores)) < len(scores)


def test_every_seed_has_successors() -> None:
    """Answers of one request have seeds that count up; what comes after the greatest is allowed, too."""
    assert [seed_after(5, 2), seed_after(None, 2), seed_after(2**63 - 1, 1)] == [7, None, 0]
    assert SamplingParams(seed=2**63 - 1).seed == 2**63 - 1
