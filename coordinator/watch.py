"""What an engine is doing, in numbers, from the steps of the last seconds. Knows no terminal: see `watch_view`."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from coordinator.timing import EngineLoad, StepRecord

WINDOW_S = 5.0


@dataclass(frozen=True, slots=True)
class StageNumbers:
    """`busy` is a share of the time, 0 to 1; `num_queued` steps were on their way or waited for it, on average."""

    busy: float
    num_queued: float
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Numbers:
    """Averages over the last seconds, but for `load` and each stage's `kv_tokens`, which are the latest known.

    Tokens go in as prompts and come out as answers.
    """

    stages: tuple[StageNumbers, ...]
    coordinator_busy: float
    tokens_in_per_s: float
    tokens_out_per_s: float
    steps_per_s: float
    steps_in_flight: float
    load: EngineLoad


class Meter:
    """Takes in steps as they come back, and keeps those of the last `window_s` seconds.

    While there is work, a window does not end now: nothing is known yet of the steps under way, and to count that time
    as idle would be wrong. It ends where the last step that came back was with what is looked at, because all that
    was there before it, steps being in order, has come back, too.
    """

    def __init__(self, num_stages: int, window_s: float = WINDOW_S) -> None:
        self._window_s = window_s
        self._records: deque[StepRecord] = deque()
        self._kv_tokens = [0] * num_stages
        self._began_at_s = 0.0

    def add(self, record: StepRecord) -> None:
        """Take in a step."""
        if not self._records:
            self._began_at_s = record.submitted_at_s
        self._records.append(record)
        while self._records[0].arrived_at_s < record.submitted_at_s - self._window_s:
            self._records.popleft()
        for stage in record.stages:
            self._kv_tokens[stage.stage_index] = stage.kv_tokens

    def numbers(self, now_s: float, load: EngineLoad, *, is_stopped: bool = False) -> Numbers:
        """As of now; `is_stopped`: no step is under way although there is work, as while a stage is brought back."""
        if not self._records:
            idle = tuple(StageNumbers(0.0, 0.0, 0) for _ in self._kv_tokens)
            return Numbers(idle, 0.0, 0.0, 0.0, 0.0, 0.0, load)
        last, is_working = self._records[-1], load.num_running + load.num_waiting > 0 and not is_stopped
        sent = self._window(last.submitted_at_s if is_working else now_s)
        came = self._window(last.arrived_at_s if is_working else now_s)
        ways = {way.stage_index: way for way in _ways(last)} if is_working else {}
        stages = range(len(self._kv_tokens))
        return Numbers(
            stages=tuple(self._stage(index, ways.get(index), came) for index in stages),
            coordinator_busy=sum(sent.share(lap.started_at_s, lap.ended_at_s) for r in self._records for lap in r.ends),
            tokens_in_per_s=self._rate(came, [r.num_tokens if r.kind == "prefill" else 0 for r in self._records]),
            tokens_out_per_s=self._rate(came, [record.num_new_tokens for record in self._records]),
            steps_per_s=self._rate(came, [1] * len(self._records)),
            steps_in_flight=sum(sent.share(r.submitted_at_s, r.arrived_at_s) for r in self._records),
            load=load,
        )

    def _window(self, end_s: float) -> "_Window":
        return _Window(max(end_s - self._window_s, self._began_at_s), end_s)

    def _stage(self, index: int, last: "_Way | None", otherwise: "_Window") -> StageNumbers:
        ways = [way for record in self._records for way in _ways(record) if way.stage_index == index]
        at_work = otherwise if last is None else self._window(last.ended_at_s)
        waiting = otherwise if last is None else self._window(last.queued_at_s)
        return StageNumbers(
            busy=sum(at_work.share(way.started_at_s, way.ended_at_s) for way in ways),
            num_queued=sum(waiting.share(way.queued_at_s, way.started_at_s) for way in ways),
            kv_tokens=self._kv_tokens[index],
        )

    def _rate(self, window: "_Window", amounts: list[int]) -> float:
        """Per second: each step's amount came between the step before it, or its own beginning, and its arrival."""
        rate, before_s = 0.0, self._began_at_s
        for record, amount in zip(self._records, amounts, strict=True):
            taken_s = record.arrived_at_s - max(before_s, record.submitted_at_s)
            if taken_s > 0:
                rate += amount * window.share(record.arrived_at_s - taken_s, record.arrived_at_s) / taken_s
            before_s = record.arrived_at_s
        return rate


@dataclass(frozen=True, slots=True)
class _Way:
    """A step at one stage: on its way to it or waiting from `queued_at_s` on, then computed."""

    stage_index: int
    queued_at_s: float
    started_at_s: float
    ended_at_s: float


def _ways(record: StepRecord) -> Iterator[_Way]:
    queued_at_s = record.submitted_at_s
    for stage in record.stages:
        yield _Way(stage.stage_index, queued_at_s, stage.sent_at_s - stage.compute_s, stage.sent_at_s)
        queued_at_s = stage.sent_at_s


@dataclass(frozen=True, slots=True)
class _Window:
    """The seconds that are looked at."""

    start_s: float
    end_s: float

    def share(self, from_s: float, to_s: float) -> float:
        """How much of the window lies between two times, 0 to 1."""
        inside_s = min(to_s, self.end_s) - max(from_s, self.start_s)
        return max(0.0, inside_s) / (self.end_s - self.start_s) if self.end_s > self.start_s else 0.0
