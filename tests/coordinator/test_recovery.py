"""Which losses are worth another attempt, how long to wait, when to give up; and what becomes of the answers."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.errors import LaunchError, ReplanError, StageLost, StepStuck, WorkerAbsent, WorkerDied
from coordinator.mending import Mender
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.recovery import (
    LEAST_PATIENCE_S,
    SIGN_BYTES,
    LoadPatience,
    MemoryKills,
    Patience,
    Recovery,
    RecoveryPolicy,
    next_try,
)
from coordinator.scheduler import SchedulerSettings
from coordinator.supervisor import Supervisor
from glm.sampling import SamplingParams
from tests.coordinator.hash_model import HashPipeline, expected_ids, hash_engine, request

GREEDY = SamplingParams(greedy=True)


def test_delays_double_up_to_a_cap_and_attempts_end() -> None:
    """At once, then 0.5 s, 1 s, 2 s, ..., never beyond the most; None when the attempts are used up."""
    recovery = Recovery(RecoveryPolicy(max_attempts=6, most_delay_s=3.0))
    delays = [recovery.next_delay_s(StageLost("x")) for _ in range(7)]
    assert delays == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0, None]


def test_only_listed_causes_are_tried_again() -> None:
    """A worker that died may come back; one that cannot load its layers will not be able to next time."""
    recovery = Recovery(RecoveryPolicy())
    assert recovery.next_delay_s(LaunchError("no memory for the layers")) is None
    assert recovery.next_delay_s(WorkerDied("x")) == 0.0


def test_attempts_are_forgotten_when_all_was_well_for_a_while() -> None:
    """A stage that dies again soon goes on counting; one that dies after an hour of service has all attempts again."""
    recovery = Recovery(RecoveryPolicy(max_attempts=2, settled_s=30.0))
    for now_s, delay_s in ((0.0, 0.0), (10.0, 0.5), (20.0, None)):
        assert recovery.next_delay_s(StageLost("x")) == delay_s
        recovery.recovered(now_s)
        recovery.served(now_s + 5.0)
    recovery.served(60.0)
    assert recovery.next_delay_s(StageLost("x")) == 0.0


def test_time_that_merely_passes_forgets_no_attempts() -> None:
    """A step that sticks anew after each recovery is noticed long after it, and is not tried again for ever."""
    recovery = Recovery(RecoveryPolicy(max_attempts=2, settled_s=30.0))
    for now_s, delay_s in ((0.0, 0.0), (40.0, 0.5), (80.0, None)):
        assert recovery.next_delay_s(StepStuck("x")) == delay_s
        recovery.recovered(now_s)
        recovery.served(now_s + 1.0)  # another sequence's outcome before the one that sticks


def test_patience_follows_from_what_such_steps_took_lately() -> None:
    """Ten times as long as the second slowest of the latest of its kind, at least 30 s, at most 15 minutes more."""
    patience = Patience()
    assert patience.limit_s([]) == LEAST_PATIENCE_S
    assert patience.limit_s([("decode", 1)]) == 900.0 and patience.limit_s([("prefill", 512)]) == 5120.0
    for _ in range(20):
        patience.observe("decode", 1, 0.1)
        patience.observe("prefill", 256, 20.0)
    assert patience.limit_s([("decode", 5)]) == LEAST_PATIENCE_S
    assert patience.limit_s([("decode", 5), ("prefill", 256)]) == 200.0
    assert patience.limit_s([("prefill", 512)]) == 400.0


def test_patience_forgets_stalls() -> None:
    """One step that was held up makes nobody wait longer; several do, until as many good ones have come since."""
    patience = Patience()
    for seconds in (4.0, 4.0, 400.0):
        patience.observe("decode", 4, seconds)
    assert patience.limit_s([("decode", 4)]) == 40.0
    patience.observe("decode", 4, 400.0)
    assert patience.limit_s([("decode", 4)]) == 400.0 + 900.0
    for _ in range(20):
        patience.observe("decode", 4, 4.0)
    assert patience.limit_s([("decode", 4)]) == 40.0


def test_a_load_must_go_on() -> None:
    """Two minutes without a layer or a megabyte, or five times the slowest layer, are too long."""
    patience = LoadPatience()
    patience.wait(100.0, 0, ())
    patience.wait(100.0, 0, (10, 0))  # the first counts tell nothing yet
    assert patience.idle_s == 200.0 > patience.limit_s == 120.0
    patience.wait(10.0, 0, (10 + SIGN_BYTES, 0))
    assert patience.idle_s == 0.0
    for _ in range(9):
        patience.wait(10.0, 0, (10 + SIGN_BYTES + 7000, 300))  # what answering pings reads
    assert patience.idle_s == 90.0
    patience.wait(10.0, 1, (10 + SIGN_BYTES, 0))
    assert patience.idle_s == 0.0 and patience.limit_s == 5 * 310.0
    patience.wait(1000.0, 1, (10 + SIGN_BYTES, -SIGN_BYTES))
    assert patience.idle_s == 0.0 and patience.num_layers == 1
    patience.wait(1551.0, 1, (10 + SIGN_BYTES, -SIGN_BYTES))
    assert patience.idle_s > patience.limit_s


def test_small_steps_tell_little_of_large_ones() -> None:
    """What every step costs is not multiplied by a large one's tokens, if there was one not much smaller."""
    patience = Patience()
    for _ in range(3):
        patience.observe("prefill", 400, 8.0)
        patience.observe("prefill", 2, 1.0)
    assert patience.limit_s([("prefill", 512)]) == pytest.approx(80.0 * 512 / 400)


def test_what_is_done_next_is_told_as_it_is() -> None:
    """Nobody starts a worker of another host: it is awaited, or a spare is looked for when it was in vain."""
    own, other = StagePlan("cpu", 0, 1, "fp32"), StagePlan("cpu", 1, 2, "fp32", host="lab3")
    plan = Plan((own, other, own, other), EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32"))
    assert next_try(plan, {0}, 60.0) == "starting it again"
    assert next_try(plan, {0, 2}, 60.0) == "starting stage 1, stage 3 again"
    assert next_try(plan, {1}, 60.0) == "waiting 60 s at most for it to come back"
    assert next_try(plan, {1}, 0.0) == "looking for a spare worker in the place of it"
    assert next_try(plan, {0, 1, 3}, 2.5) == (
        "starting stage 1 again, waiting 2.5 s at most for stage 2, stage 4 to come back"
    )
    assert next_try(plan, (), 60.0) == "trying again"


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

    def collect(self, epoch: int, _limit_s: object = None):  # type: ignore[no-untyped-def]
        if self._left == 0:
            self._left = None
            raise StageLost("stage 1 ended with signal SIGKILL while serving")
        if self._left is not None:
            self._left -= 1
        return self._collect(epoch)

    def check(self) -> None: ...

    kv_budgets, num_stages, epoch, plan = (1000,), 1, 1, "a plan"

    def suspect(self, what: str) -> str:
        return f"stage 1 seems to be stuck: {what}"

    def leave_out_lost(self, _choose: object) -> tuple[str, ...]:
        raise ReplanError("nowhere")

    def next_try(self, _is_stuck: bool) -> str:
        return "starting it again"

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


@pytest.mark.parametrize(
    ("counts", "num_attempts"), [([0, 1], 0), ([0, 0, 0], 1), ([None, None, None], 1)], ids=["told", "not", "unknown"]
)
def test_a_launch_does_not_go_on_starting_workers_that_memory_kills(
    counts: list[int | None], num_attempts: int
) -> None:
    """Where the system has counted such a kill not once, elsewhere once more; it ends with needs, haves and remedy."""
    text = "stage 1 (cpu of this host, pid 7) ended with signal SIGKILL while loading; the system has probably run out"

    class Starving(Losing):
        def load(self) -> None:
            raise WorkerDied(text, by_sigkill=True)

        def recover(self, _is_stuck: bool) -> int:
            raise WorkerDied(text, by_sigkill=True)

    _, pipeline = hash_engine(SchedulerSettings(1000))
    told, memory = list[str](), ["memory of cpu: 9.0 GB needed, 8.0 GB available"]
    mender = Mender(Starving(pipeline, []), RecoveryPolicy(), told.append, sleep=lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(WorkerDied) as raised:
        mender.load(MemoryKills(iter(counts).__next__), memory)
    assert str(raised.value) == f"{text}\n{memory[0]}"
    assert len(told) == num_attempts


def test_a_running_launch_brings_back_whoever_was_killed() -> None:
    """Whatever for: readers wait, and the attempts are those that were asked for."""
    engine, pipeline = hash_engine(SchedulerSettings(1000))

    class Starving(Losing):
        def recover(self, _is_stuck: bool) -> int:
            raise WorkerDied("SIGKILL while loading", by_sigkill=True)

    told = list[str]()
    mender = Mender(Starving(pipeline, [1]), RecoveryPolicy(), told.append, sleep=lambda _: None)  # type: ignore[arg-type]
    supervisor = Supervisor(engine, mender._cluster, mender)
    request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert sum("starting it again" in line for line in told) == 5


class Shrinking(Losing):
    """Never comes back with two stages; `leave_out_lost` leaves one, which does, with a smaller budget."""

    kv_budgets, num_stages = (1000, 1000), 2

    def recover(self, is_stuck: bool) -> int:
        if self.num_stages == 2:
            raise WorkerDied("stage 2 died again")
        return super().recover(is_stuck)

    def leave_out_lost(self, _choose: object) -> tuple[str, ...]:
        self.kv_budgets, self.num_stages, self.plan = (60,), 1, "another plan"
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


def test_what_changed_before_a_recovery_that_failed_is_told_by_the_one_that_works() -> None:
    """The other plan's first recovery fails and is given up: the engine has the new budget when a later one works."""
    engine, pipeline = hash_engine(SchedulerSettings(1000, max_steps_in_flight=3))
    shrinking, seen = Shrinking(pipeline, [2], num_failing=1), list[int]()
    policy = RecoveryPolicy(max_attempts=0, replan=True)
    mender = Mender(shrinking, policy, choose=lambda *_: None, sleep=lambda _: None)  # type: ignore[arg-type, return-value]
    supervisor = Supervisor(engine, shrinking, mender)
    supervisor.on_replanned.append(lambda: seen.append(shrinking.num_stages))
    leave_out = shrinking.leave_out_lost

    def leave_out_once(choose: object) -> tuple[str, ...]:
        if shrinking.num_stages == 1:
            raise ReplanError("nobody is known to be lost")
        return leave_out(choose)

    shrinking.leave_out_lost = leave_out_once  # type: ignore[method-assign]
    failed = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert failed.error is not None and seen == []
    mender.policy = mender._recovery.policy = RecoveryPolicy(max_attempts=1)
    good = request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert good.new_ids == expected_ids([1, 2, 3], 12, GREEDY, is_repetitive=False)
    assert seen == [1]
    assert (engine.settings.kv_budget_tokens, engine.settings.max_steps_in_flight) == (60, 2)


def test_a_stage_that_has_moved_is_told_of() -> None:
    """A spare has taken it: there are as many stages with the same budgets, and whoever draws them hears of it."""
    engine, pipeline = hash_engine(SchedulerSettings(1000))
    losing, seen = Losing(pipeline, [2, 2]), list[str]()
    recover = losing.recover

    def recover_elsewhere(is_stuck: bool) -> int:
        if losing.num_recovered == 0:
            losing.plan = "a plan of other hosts"
        return recover(is_stuck)

    losing.recover = recover_elsewhere  # type: ignore[method-assign]
    supervisor = Supervisor(engine, losing, Mender(losing, RecoveryPolicy(), sleep=lambda _: None))
    supervisor.on_replanned.append(lambda: seen.append(losing.plan))
    request(engine, [1, 2, 3], 12, GREEDY)
    while not engine.is_idle:
        supervisor.step()
    assert losing.num_recovered == 2 and seen == ["a plan of other hosts"]
