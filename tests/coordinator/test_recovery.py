"""Which losses are worth another attempt, how long to wait, when to give up; and what becomes of the answers."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import LaunchError, ReplanError, StageLost, WorkerAbsent, WorkerDied
from coordinator.mending import Mender
from coordinator.recovery import LEAST_PATIENCE_S, Patience, Recovery, RecoveryPolicy
from coordinator.scheduler import SchedulerSettings
from coordinator.supervisor import Supervisor
from glm.sampling import SamplingParams
from tests.coordinator.hash_model import HashPipeline, expected_ids, hash_engine, request

GREEDY = SamplingParams(greedy=True)


def test_delays_double_up_to_a_cap_and_attempts_end() -> None:
    """At once, then 0.5 s, 1 s, 2 s, ..., never beyond the most; None when the attempts are used up."""
    recovery = Recovery(RecoveryPolicy(max_attempts=6, most_delay_s=3.0))
    delays = [recovery.next_delay_s(StageLost("x"), 0.0) for _ in range(7)]
    assert delays == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0, None]


def test_only_listed_causes_are_tried_again() -> None:
    """A worker that died may come back; one that cannot load its layers will not be able to next time."""
    recovery = Recovery(RecoveryPolicy())
    assert recovery.next_delay_s(LaunchError("no memory for the layers"), 0.0) is None
    assert recovery.next_delay_s(WorkerDied("x"), 0.0) == 0.0


def test_attempts_are_forgotten_when_all_was_well_for_a_while() -> None:
    """A stage that dies again soon goes on counting; one that dies after an hour has all attempts again."""
    recovery = Recovery(RecoveryPolicy(max_attempts=2, settled_s=30.0))
    for now_s, delay_s in ((0.0, 0.0), (10.0, 0.5), (20.0, None)):
        assert recovery.next_delay_s(StageLost("x"), now_s) == delay_s
        recovery.recovered(now_s)
    assert recovery.next_delay_s(StageLost("x"), 60.0) == 0.0


def test_patience_follows_from_what_steps_took() -> None:
    """No limit before anything is known; then ten times the slowest token so far, for each one."""
    patience = Patience()
    assert patience.limit_s(5) is None
    patience.observe(1, 0.1)
    assert patience.limit_s(5) == LEAST_PATIENCE_S
    patience.observe(256, 256 * 2.0)
    patience.observe(1, 0.2)
    assert patience.limit_s(8) == 160.0


class Losing:
    """Loses the pipeline after some of the outcomes, as `lost_after` says; brings it back empty."""

    def __init__(self, pipeline: HashPipeline, lost_after: list[int], num_failing: int = 0) -> None:
        self._pipeline = pipeline
        self._collect = pipeline.collect
        self._counts = iter(lost_after)
        self._left = next(self._counts, None)
        self._num_failing = num_failing
        self._epochs = itertools.count(2)
        self.num_recovered = 0
        pipeline.collect = self.collect  # type: ignore[method-assign]

    def collect(self, epoch: int, _patience_s: float | None = None):  # type: ignore[no-untyped-def]
        if self._left == 0:
            self._left = None
            raise StageLost("stage 1 ended with signal SIGKILL while serving")
        if self._left is not None:
            self._left -= 1
        return self._collect(epoch)

    def check(self) -> None: ...

    kv_budgets, num_stages, epoch = (1000,), 1, 1

    def suspect(self) -> str:
        return "stage 1"

    def leave_out_lost(self, _choose: object) -> tuple[str, ...]:
        raise ReplanError("nowhere")

    def join(self) -> None: ...

    def load(self) -> None: ...

    def replace_lost(self, is_stuck: bool) -> None: ...

    def awaited(self) -> str | None:
        return None

    def recover(self, _is_stuck: bool) -> int:
        if self._num_failing:
            self._num_failing -= 1
            raise WorkerDied("it died again")
        self.num_recovered += 1
        self._pipeline.cached.clear()
        self._pipeline._in_flight.clear()
        self._left = next(self._counts, None)
        return next(self._epochs)


@given(
    lost_after=st.lists(st.integers(0, 12), max_size=4),
    prompts=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=4),
    speculate=st.booleans(),
    seed=st.none() | st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_losses_change_no_token(
    lost_after: list[int], prompts: list[list[int]], speculate: bool, seed: int | None
) -> None:
    """Whenever the pipeline is lost, every sequence is fed again and ends with the tokens it would have had."""
    params = SamplingParams(greedy=seed is None, seed=seed)
    limits = SchedulerSettings(1000, prefill_chunk=8, max_steps_in_flight=3, speculate=speculate)
    engine, pipeline = hash_engine(limits, is_repetitive=True)
    losing = Losing(pipeline, lost_after)
    supervisor = Supervisor(engine, losing, Mender(losing, RecoveryPolicy(), sleep=lambda _: None))
    sequences = [request(engine, prompt, 12, params) for prompt in prompts]
    while not engine.is_idle:
        supervisor.step()
    for sequence, prompt in zip(sequences, prompts, strict=True):
        assert sequence.new_ids == expected_ids(prompt, 12, params, is_repetitive=True)


def test_giving_up_fails_the_requests_and_serves_the_next_one() -> None:
    """All attempts fail: the requests end with the reason; a later request finds the pipeline mended."""
    engine, pipeline = hash_engine(SchedulerSettings(1000))
    losing = Losing(pipeline, [2], num_failing=3)
    told: list[str] = []
    mender = Mender(losing, RecoveryPolicy(max_attempts=3), told.append, sleep=lambda _: None)
    supervisor = Supervisor(engine, losing, mender)
    failed = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert "could not be brought back: it died again" in str(failed.error)
    assert "attempt 3 of 3" in told[2] and told[3].startswith("given up")
    good = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert good.new_ids == expected_ids([1, 2, 3], 12, GREEDY, is_repetitive=False)


def test_while_a_worker_is_awaited_requests_fail_at_once_and_its_return_is_enough() -> None:
    """It did not come back in time: nobody waits for it again; when it is there, the idle pipeline is mended."""
    engine, pipeline = hash_engine(SchedulerSettings(1000))
    losing = Losing(pipeline, [2])
    absent = ["stage 2 (cpu of lab3)"]
    recover = losing.recover

    def recover_if_there(is_stuck: bool) -> int:
        if absent:
            raise WorkerAbsent(f"{absent[0]} did not come back within 1 s")
        losing.check = lambda: None  # type: ignore[method-assign]
        return recover(is_stuck)

    def check() -> None:
        raise StageLost("it is still broken")

    losing.recover = recover_if_there  # type: ignore[method-assign]
    losing.awaited = lambda: absent[0] if absent else None  # type: ignore[method-assign]
    told: list[str] = []
    supervisor = Supervisor(engine, losing, Mender(losing, RecoveryPolicy(), told.append, sleep=lambda _: None))
    first = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    losing.check = check  # type: ignore[method-assign]
    second = request(engine, [1, 2, 3], 12, GREEDY)
    supervisor.step()
    assert "did not come back within 1 s" in str(first.error)
    assert "stage 2 (cpu of lab3) is still awaited" in str(second.error)
    supervisor.check()
    assert len(told) == 2 and told[1].startswith("given up")

    absent.clear()
    supervisor.check()
    assert "all stages serve again" in told[-1]
    good = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert good.new_ids == expected_ids([1, 2, 3], 12, GREEDY, is_repetitive=False)


class Shrinking(Losing):
    """Never comes back with two stages; `leave_out_lost` leaves one, which does, with a smaller budget."""

    kv_budgets, num_stages = (1000, 1000), 2

    def recover(self, is_stuck: bool) -> int:
        if self.num_stages == 2:
            raise WorkerDied("stage 2 died again")
        return super().recover(is_stuck)

    def leave_out_lost(self, _choose: object) -> tuple[str, ...]:
        self.kv_budgets, self.num_stages = (60,), 1
        return ("layers 3-4: from stage 2 to stage 1",)


def test_stages_that_are_left_go_on_by_themselves() -> None:
    """Behind the last attempt comes another plan: requests go on, within the budget and the steps of fewer stages."""
    engine, pipeline = hash_engine(SchedulerSettings(1000, max_steps_in_flight=3))
    shrinking, told, seen = Shrinking(pipeline, [2]), list[str](), list[int]()
    policy = RecoveryPolicy(max_attempts=2, replan=True)
    mender = Mender(shrinking, policy, told.append, choose=lambda *_: None, sleep=lambda _: None)  # type: ignore[arg-type, return-value]
    supervisor = Supervisor(engine, shrinking, mender)
    supervisor.on_replanned.append(lambda: seen.append(shrinking.num_stages))
    sequence = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert sequence.new_ids == expected_ids([1, 2, 3], 12, GREEDY, is_repetitive=False)
    assert "attempt 2 of 2" in told[1]
    assert told[2].startswith("stage 2 died again\ngiven up; its layers go to the other stages:\n  layers 3-4: from")
    assert seen == [1]
    assert (engine.settings.kv_budget_tokens, engine.settings.max_steps_in_flight) == (60, 2)
    too_long = request(engine, [1] * 80, 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert "the tightest stage has 60" in str(too_long.error)
