"""The scheduler alone: pure, so every property can be tried on many states."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.plan import PREFILL_CHUNK
from coordinator.scheduler import SchedulerSettings, admissible, next_step
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
    sequence.num_cached = sequence.num_sent = sequence.num_held = num_cached
    return sequence


SETTINGS = SchedulerSettings(kv_budget_tokens=10**6, max_num_seqs=10**6)


@st.composite
def states(draw: st.DrawFn) -> list[Sequence]:
    """Sequences waiting, half prefilled, or decoding with one token to feed."""
    is_prefix = draw(st.booleans())
    found = []
    for sequence_id in range(draw(st.integers(1, 6))):
        num_prompt = draw(st.integers(1, 3 * PREFILL_CHUNK))
        if draw(st.booleans()):
            cached = 0 if is_prefix else draw(st.sampled_from([0, min(num_prompt - 1, PREFILL_CHUNK)]))
            found.append(a_sequence(sequence_id, num_prompt, 0, cached, is_prefix))
        else:
            num_new = draw(st.integers(1, 50))
            found.append(a_sequence(sequence_id, num_prompt, num_new, num_prompt + num_new - 1, is_prefix))
    return found


@given(states())
def test_a_step_is_always_possible(running: list[Sequence]) -> None:
    """Every chunk starts where its cache ends; whatever lives can be fed in one of the two kinds of steps."""
    chunks = []
    for kind in ("prefill", "decode"):
        chunks += next_step(running, SETTINGS, kind=kind).chunks  # type: ignore[arg-type]
    assert chunks
    for chunk in chunks:
        assert chunk.start_pos == chunk.sequence.num_cached
        assert 0 < chunk.num_tokens <= len(chunk.sequence.token_ids) - chunk.start_pos
        assert chunk.completes is (chunk.end == len(chunk.sequence.token_ids))


@given(states())
def test_prompts_go_in_order_and_fill_a_chunk(running: list[Sequence]) -> None:
    """The oldest first; a causal step has at most a chunk's tokens, a prefix LM's prompts are whole."""
    chunks = next_step(running, SETTINGS, kind="prefill").chunks
    waiting = [s for s in running if s.is_prefilling]
    assert [chunk.sequence for chunk in chunks][:1] == waiting[:1]
    if not waiting or waiting[0].layout is not None:
        assert all(chunk.completes for chunk in chunks)
    else:
        assert [chunk.sequence for chunk in chunks] == waiting[: len(chunks)]
        assert sum(chunk.num_tokens for chunk in chunks) <= PREFILL_CHUNK
        assert all(chunk.completes for chunk in chunks[:-1])


@given(states(), st.integers(1, 12_000))
def test_growth_stays_within_the_budget(running: list[Sequence], budget: int) -> None:
    """After the newest have given way, what is held and what is fed fit together; the oldest never gives way."""
    settings = SchedulerSettings(kv_budget_tokens=budget)
    decision = next_step(running, settings, kind="decode")
    kept = [s for s in running if s not in decision.set_back]
    if decision.chunks:
        fed = {id(chunk.sequence): chunk.end for chunk in decision.chunks}
        assert sum(max(s.num_reserved, fed.get(id(s), 0)) for s in kept) <= budget
    assert running[0] in kept
    assert set(map(id, decision.set_back)) == set(map(id, running[len(kept) :]))


def test_finished_sequences_are_left_alone() -> None:
    """A finished sequence takes no part."""
    done, live = (a_sequence(i, 10, 1, 10, is_prefix=False) for i in range(2))
    done.finish_reason = "stop"
    assert [chunk.sequence for chunk in next_step([done, live], SETTINGS, kind="decode").chunks] == [live]


def test_a_step_carries_no_more_sequences_than_a_message_may() -> None:
    """The longest waiting are fed; the others wait their turn."""
    crowd = [a_sequence(i, 1, 1, 1, is_prefix=False) for i in range(MAX_SPANS + 5)]
    decision = next_step(crowd, SETTINGS, kind="decode")
    assert [chunk.sequence for chunk in decision.chunks] == crowd[:MAX_SPANS]
    assert decision.set_back == ()


def test_admission_keeps_to_places_and_to_room() -> None:
    """As many as there are places, as far as there is room for each with some to grow, in order of arrival."""
    waiting = [a_sequence(i, 10, 0, 0, is_prefix=False) for i in range(5)]
    assert admissible(waiting, [], SchedulerSettings(1000, max_num_seqs=3)) == waiting[:3]
    assert admissible(waiting, [], SchedulerSettings(53)) == waiting[:2]
    assert admissible(waiting, [], SchedulerSettings(9)) == []
