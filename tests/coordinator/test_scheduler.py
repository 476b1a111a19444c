"""The scheduler alone: pure, so every property can be tried on many states."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduler import PREFILL_CHUNK_TOKENS, next_step
from coordinator.sequence import Sequence
from glm.positions import PromptLayout
from glm.sampling import Sampler, SamplingParams
from protocol.limits import MAX_SPANS


def a_sequence(sequence_id: int, num_prompt: int, num_new: int, num_cached: int, is_prefix: bool) -> Sequence:
    sequence = Sequence(
        sequence_id,
        [1] * num_prompt,
        Sampler(SamplingParams(greedy=True)),
        layout=PromptLayout(num_prompt - 1, 0) if is_prefix else None,
        end_ids=frozenset(),
        max_new_tokens=None,
        max_length=10**6,
        max_context=10**6,
    )
    sequence.token_ids += [2] * num_new
    sequence.num_cached = num_cached
    return sequence


@st.composite
def states(draw: st.DrawFn) -> list[Sequence]:
    """Sequences waiting, half prefilled, or decoding with one token to feed."""
    is_prefix = draw(st.booleans())
    found = []
    for sequence_id in range(draw(st.integers(1, 6))):
        num_prompt = draw(st.integers(1, 3 * PREFILL_CHUNK_TOKENS))
        if draw(st.booleans()):
            cached = 0 if is_prefix else draw(st.sampled_from([0, min(num_prompt - 1, PREFILL_CHUNK_TOKENS)]))
            found.append(a_sequence(sequence_id, num_prompt, 0, cached, is_prefix))
        else:
            num_new = draw(st.integers(1, 50))
            found.append(a_sequence(sequence_id, num_prompt, num_new, num_prompt + num_new - 1, is_prefix))
    return found


@given(states(), st.integers(1, 12_000))
def test_a_step_is_always_possible_and_within_the_budget(running: list[Sequence], budget: int) -> None:
    """Every chunk starts where its cache ends; kept sequences fit; something happens whenever something lives."""
    decision = next_step(running, budget)
    kept = [s for s in running if s not in decision.rejected]
    assert sum(len(s.token_ids) for s in kept) <= budget
    assert decision.chunks or decision.rejected
    for chunk in decision.chunks:
        assert chunk.start_pos == chunk.sequence.num_cached
        assert 0 < chunk.num_tokens <= len(chunk.sequence.token_ids) - chunk.start_pos
        whole = chunk.start_pos + chunk.num_tokens == len(chunk.sequence.token_ids)
        assert chunk.completes is whole
        assert whole or (chunk.sequence.layout is None and chunk.num_tokens == PREFILL_CHUNK_TOKENS)


@given(states())
def test_the_oldest_waiting_prompt_goes_first_and_alone(running: list[Sequence]) -> None:
    """Nobody overtakes: the first sequence with an unfed prompt makes the step, else all decode together."""
    decision = next_step(running, 10**9)
    waiting = [s for s in running if s.num_cached < s.num_prompt]
    fed = [chunk.sequence for chunk in decision.chunks]
    assert fed == (waiting[:1] or running)


def test_finished_sequences_are_left_alone() -> None:
    """A finished sequence takes no part and needs no room."""
    done, live = (a_sequence(i, 10, 1, 10, False) for i in range(2))
    done.finish_reason = "stop"
    decision = next_step([done, live], 11)
    assert [chunk.sequence for chunk in decision.chunks] == [live]
    assert decision.rejected == ()


def test_a_step_carries_no_more_sequences_than_a_message_may() -> None:
    """The oldest are fed; the others wait their turn and are not rejected."""
    crowd = [a_sequence(i, 1, 1, 1, is_prefix=False) for i in range(MAX_SPANS + 5)]
    decision = next_step(crowd, 10**6)
    assert [chunk.sequence for chunk in decision.chunks] == crowd[:MAX_SPANS]
    assert decision.rejected == ()
