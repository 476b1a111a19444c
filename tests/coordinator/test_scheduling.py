"""Whatever is scheduled how: every sequence gets exactly its tokens, in fair order, within the budget."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.engine import Engine
from coordinator.pipeline import FIRST_STEP_ID
from coordinator.scheduler import SchedulerSettings
from coordinator.sequence import Sequence
from glm.positions import PromptLayout
from glm.sampling import SamplingParams
from protocol.data import DropSequence
from tests.coordinator.hash_model import expected_ids, hash_engine, request

MANY_STEPS = 4000


@dataclass(frozen=True)
class Wish:
    """A request, and after how many steps it comes."""

    prompt: tuple[int, ...]
    num_new: int
    comes_after: int
    seed: int | None
    cancelled_after: int | None


STEM = tuple(n * n % 11 for n in range(40))
prompts = st.builds(
    lambda num_common, own: (*STEM[:num_common], *own),
    st.integers(0, 40),
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
)
wishes = st.lists(
    st.builds(
        Wish,
        prompt=prompts,
        num_new=st.integers(1, 50),
        comes_after=st.integers(0, 6),
        seed=st.none() | st.integers(0, 5),
        cancelled_after=st.none() | st.none() | st.none() | st.integers(0, 10),
    ),
    min_size=1,
    max_size=9,
)
scheduling = st.builds(
    SchedulerSettings,
    kv_budget_tokens=st.integers(110, 300),
    max_num_seqs=st.integers(1, 6),
    prefill_chunk=st.integers(1, 16),
    max_steps_in_flight=st.integers(1, 5),
    max_step_tokens=st.sampled_from((16, 20, 2**20)),
    steps_in_flight=st.none() | st.integers(1, 4),
    speculate=st.booleans(),
    reuse=st.booleans(),
)


def params_of(wish: Wish) -> SamplingParams:
    return SamplingParams(greedy=wish.seed is None, seed=wish.seed)


def run(engine: Engine, asked: list[Wish], layout: PromptLayout | None) -> list[Sequence]:
    """Everything until the end; the budget is watched by the pipeline, starvation by the number of steps."""
    sequences: list[Sequence] = []
    waiting = sorted(enumerate(asked), key=lambda item: (item[1].comes_after, item[0]))
    for number in range(MANY_STEPS):
        while waiting and waiting[0][1].comes_after <= number:
            _, wish = waiting.pop(0)
            sequences.append(request(engine, wish.prompt, wish.num_new, params_of(wish), layout=layout))
        for sequence, (_, wish) in zip(
            sequences, sorted(enumerate(asked), key=lambda i: (i[1].comes_after, i[0])), strict=False
        ):
            if wish.cancelled_after is not None and number == wish.comes_after + wish.cancelled_after:
                engine.cancel(sequence)
        engine.step()
        if engine.is_idle and not waiting:
            return sequences
    raise AssertionError("somebody starves")


@given(asked=wishes, limits=scheduling, is_repetitive=st.booleans(), is_prefix_lm=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_sequence_gets_exactly_its_tokens(
    asked: list[Wish], limits: SchedulerSettings, is_repetitive: bool, is_prefix_lm: bool
) -> None:
    """Joining, leaving, chunks, steps in flight, set-backs, reuse, drafts: the tokens are those of plain decoding."""
    engine, pipeline = hash_engine(limits, is_repetitive=is_repetitive)
    sequences = run(engine, asked, PromptLayout(1, None) if is_prefix_lm else None)
    ordered = sorted(asked, key=lambda wish: wish.comes_after)
    for sequence, wish in zip(sequences, ordered, strict=True):
        assert sequence.error is None
        wanted = expected_ids(wish.prompt, wish.num_new, params_of(wish), is_repetitive)
        if sequence.finish_reason == "cancelled":
            assert sequence.new_ids == wanted[: len(sequence.new_ids)]
        else:
            assert sequence.new_ids == wanted
    engine.forget_prefixes()
    pipeline.finish()
    assert pipeline.kv_tokens == 0, "nothing is left behind"
    assert pipeline.most_in_flight <= limits.max_steps_in_flight + 1  # one may carry updates only


@given(asked=wishes, limits=scheduling, is_prefix_lm=st.booleans())
@settings(max_examples=100, deadline=None)
def test_a_step_never_mixes_what_the_family_forbids(
    asked: list[Wish], limits: SchedulerSettings, is_prefix_lm: bool
) -> None:
    """A prefix LM's prompt travels whole; prompts' pieces keep to the chunk's size."""
    engine, pipeline = hash_engine(limits)
    run(engine, asked, PromptLayout(1, None) if is_prefix_lm else None)
    for step in pipeline.steps:
        assert is_prefix_lm or step.num_tokens <= limits.max_step_tokens
        fed = [span for span in step.spans if span.start_pos == 0]
        if is_prefix_lm:
            assert all(span.num_tokens >= min(len(wish.prompt) for wish in asked) for span in fed)
        elif len(step.spans) > 1 or not limits.speculate:
            assert sum(span.num_tokens for span in step.spans) <= max(limits.prefill_chunk, 16 * len(step.spans))


def test_nobody_overtakes_one_that_does_not_fit() -> None:
    """A long prompt that waits for room is served before a short one that came later, which would fit at once."""
    engine, _ = hash_engine(SchedulerSettings(kv_budget_tokens=100, speculate=False, reuse=False))
    greedy = SamplingParams(greedy=True)
    first = request(engine, [1] * 50, 10, greedy)
    engine.step()
    long, short = request(engine, [2] * 60, 1, greedy), request(engine, [3], 1, greedy)
    assert not first.is_prefilling and engine.queue() == [(1, long), (2, short)]
    assert engine.queue(1, 5) == [(2, short)] and engine.queue(0, 1) == [(1, long)]
    order = []
    while not engine.is_idle:
        order += [sequence for sequence, _ in engine.step() if sequence.is_finished]
    assert order == [first, long, short]


def test_growth_beyond_the_budget_sets_back_the_newest() -> None:
    """Two answers grow until one must give way: the newer one is computed again, and both have all their tokens."""
    engine, pipeline = hash_engine(SchedulerSettings(kv_budget_tokens=100, speculate=False, reuse=False))
    greedy = SamplingParams(greedy=True)
    older, newer = request(engine, [1, 2, 3], 60, greedy), request(engine, [4, 5, 6], 60, greedy)
    while not engine.is_idle:
        engine.step()
        assert pipeline.kv_tokens <= 100
    assert older.new_ids == expected_ids([1, 2, 3], 60, greedy, False)
    assert newer.new_ids == expected_ids([4, 5, 6], 60, greedy, False)
    assert (older.num_set_back, newer.num_set_back > 0) == (0, True)


def test_a_copy_of_a_running_sequence_finds_room_where_prefixes_are_kept() -> None:
    """What is kept gives way before the stage copies, not with the step behind it: the budget holds at every update."""
    engine, _ = hash_engine(SchedulerSettings(kv_budget_tokens=120, speculate=False))
    greedy = SamplingParams(greedy=True)
    request(engine, [1] * 60, 1, greedy)
    while not engine.is_idle:
        engine.step()
    running = request(engine, [2] * 30, 20, greedy)
    for _ in range(10):
        engine.step()
    alike = request(engine, [*[2] * 30, 3], 5, greedy)
    while not engine.is_idle:
        engine.step()
    assert alike.num_reused == 30
    assert alike.new_ids == expected_ids([*[2] * 30, 3], 5, greedy, False)
    assert running.new_ids == expected_ids([2] * 30, 20, greedy, False)


def test_what_never_fits_is_refused_with_the_number() -> None:
    """A prompt beyond the whole budget, and an answer that outgrows it alone, fail by themselves."""
    engine, _ = hash_engine(SchedulerSettings(kv_budget_tokens=20))
    greedy = SamplingParams(greedy=True)
    too_long, too_much, good = (
        request(engine, [1] * 30, 1, greedy),
        request(engine, [1], 60, greedy),
        request(engine, [2], 5, greedy),
    )
    while not engine.is_idle:
        engine.step()
    assert "30 tokens" in str(too_long.error) and "has 20" in str(too_long.error)
    assert "21 tokens" in str(too_much.error)
    assert good.new_ids == expected_ids([2], 5, greedy, False)


def test_a_long_prompt_does_not_stall_the_others() -> None:
    """While a prompt of 40 chunks is fed, another sequence gets a token for every chunk."""
    engine, pipeline = hash_engine(SchedulerSettings(kv_budget_tokens=10_000, prefill_chunk=10, speculate=False))
    greedy = SamplingParams(greedy=True)
    talking = request(engine, [1], 100, greedy)
    for _ in range(3):
        engine.step()
    before = len(talking.new_ids)
    long = request(engine, [2] * 400, 1, greedy)
    while not long.new_ids:
        engine.step()
    assert len(talking.new_ids) - before >= 38
    assert pipeline.most_in_flight == 2


def test_cancel_frees_the_cache_with_the_next_step() -> None:
    """In the middle of a prompt's chunks, too: the very next step carries the news."""
    engine, pipeline = hash_engine(SchedulerSettings(kv_budget_tokens=1000, prefill_chunk=4, max_steps_in_flight=3))
    greedy = SamplingParams(greedy=True)
    other, cancelled = request(engine, [5, 6], 50, greedy), request(engine, [1] * 40, 5, greedy)
    for _ in range(3):
        engine.step()
    num_steps = len(pipeline.steps)
    engine.cancel(cancelled)
    while len(pipeline.steps) == num_steps:
        engine.step()
    assert DropSequence(cancelled.kv_id) in pipeline.steps[num_steps].updates
    while not engine.is_idle:
        engine.step()
    assert other.new_ids == expected_ids([5, 6], 50, greedy, False)


def test_a_failed_step_fails_its_sequences_only() -> None:
    """One sequence's prompt fails at the stage; the other goes on; nothing of the failed one stays cached."""
    engine, pipeline = hash_engine(
        SchedulerSettings(kv_budget_tokens=1000, prefill_chunk=4, reuse=False, max_steps_in_flight=3)
    )
    greedy = SamplingParams(greedy=True)
    good = request(engine, [1, 2], 30, greedy)
    engine.step()
    bad = request(engine, [3] * 12, 5, greedy)
    pipeline.fails = {FIRST_STEP_ID + len(pipeline.steps) + at for at in range(2)}
    while not engine.is_idle:
        engine.step()
    pipeline.finish()
    assert "stage 1" in str(bad.error) or "stage 1" in str(good.error)
    assert pipeline.kv_tokens == 0
