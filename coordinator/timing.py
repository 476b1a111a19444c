"""Where the time of a step went: the stages' shares, which they appended to it, and the coordinator's own.

`StepTiming` has durations, for the bill of an answer. `StepRecord` has when everything happened, for whoever watches.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from coordinator.pipeline import Outcome
from protocol.data import Span, StageTiming, StepFailed
from protocol.records import with_changes

StepKind = Literal["prefill", "decode", "updates"]
"""What a step is for: pieces of prompts, the next tokens of answers, or nothing but news for the KV caches."""
EndsPart = Literal["embed", "head", "sample"]


@dataclass(frozen=True, slots=True)
class StageShare:
    """What one stage had of a step: seconds computing, seconds the step travelled to it, tokens cached after.

    `is_wire_derived`: its clock is another host's, so the travel is a share of what the whole way took beyond the rest.
    """

    compute_s: float
    wire_s: float
    kv_tokens: int
    is_wire_derived: bool = False


@dataclass(frozen=True, slots=True)
class EndsShare:
    """What the coordinator had of a step: seconds embedding, in final_layernorm and lm_head, sampling.

    `wire_s` is the way back from the last stage, which is part of that stage's `wire_s`, too.
    """

    embedding_s: float
    head_s: float
    sampling_s: float
    wire_s: float

    @property
    def compute_s(self) -> float:
        """Seconds computing, all parts together."""
        return self.embedding_s + self.head_s + self.sampling_s


@dataclass(frozen=True, slots=True)
class StepTiming:
    """When a step was sent and came back (this host's monotonic clock), and everybody's share of it."""

    submitted_at_s: float
    arrived_at_s: float
    stages: tuple[StageShare, ...]
    ends: EndsShare


@dataclass(frozen=True, slots=True)
class SpanRecord:
    """Which tokens of which sequence a step fed."""

    sequence_id: int
    start_pos: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Interval:
    """When the coordinator worked at one of its parts (this host's monotonic clock)."""

    name: EndsPart
    started_at_s: float
    ended_at_s: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step, for those who watch the engine: what it fed, what came of it, who was at it when.

    `stages` are as the stages sent them, in order, those of other hosts moved onto this host's clock (the way to them
    is then a guess, how long they had it is not). `ends` are in order of time.
    `num_new_tokens` counts the tokens that the step's outcome gave all its sequences.
    """

    step_id: int
    kind: StepKind
    spans: tuple[SpanRecord, ...]
    submitted_at_s: float
    arrived_at_s: float
    stages: tuple[StageTiming, ...]
    failed: bool
    ends: tuple[Interval, ...]
    num_new_tokens: int

    @property
    def num_tokens(self) -> int:
        """How many tokens the step fed."""
        return sum(span.num_tokens for span in self.spans)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine has at hand right now. Tokens are of the tightest stage's KV budget.

    `kv_tokens_held` are those of running sequences; kept prefixes come on top until somebody needs their room.
    """

    num_running: int
    num_waiting: int
    kv_tokens_held: int
    kv_budget_tokens: int
    steps_in_flight: int
    num_kept_prefixes: int
    kept_tokens: int


class Stopwatch:
    """Runs while its block does, any number of times; keeps when it ran."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []
        self._started_at_s = 0.0

    def __enter__(self) -> None:
        self._started_at_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.laps.append((self._started_at_s, time.monotonic()))

    @property
    def total_s(self) -> float:
        """Seconds of all laps together."""
        return sum(ended_at_s - started_at_s for started_at_s, ended_at_s in self.laps)


@dataclass(frozen=True, slots=True)
class EndsClock:
    """Measures the coordinator's parts of one step: `with clock.head: ...`."""

    embedding: Stopwatch = field(default_factory=Stopwatch)
    head: Stopwatch = field(default_factory=Stopwatch)
    sampling: Stopwatch = field(default_factory=Stopwatch)

    def intervals(self) -> tuple[Interval, ...]:
        """All laps of all parts, in order of time."""
        parts: tuple[tuple[EndsPart, Stopwatch], ...] = (
            ("embed", self.embedding),
            ("head", self.head),
            ("sample", self.sampling),
        )
        laps = [Interval(name, *lap) for name, stopwatch in parts for lap in stopwatch.laps]
        return tuple(sorted(laps, key=lambda lap: (lap.started_at_s, lap.ended_at_s)))


def step_timing(outcome: Outcome, clock: EndsClock) -> StepTiming:
    """Each hop's travel counts for the stage it leads to, and the way back for the last one.

    Processes of one host share its monotonic clock, so the difference of two stamps is the hop; see `on_one_clock`.
    """
    shares, left_at_s = [], outcome.submitted_at_s
    timings = on_one_clock(outcome)
    derived = _derived_hops(outcome)
    back_s = max(0.0, outcome.arrived_at_s - timings[-1].sent_at_s) if timings else 0.0
    for position, timing in enumerate(timings):
        wire_s = max(0.0, timing.received_at_s - left_at_s)
        if position == len(timings) - 1:
            wire_s += back_s
        is_derived = derived[position] or (position == len(timings) - 1 and derived[-1])
        shares.append(StageShare(timing.compute_s, wire_s, timing.kv_tokens, is_derived))
        left_at_s = timing.sent_at_s
    ends = EndsShare(clock.embedding.total_s, clock.head.total_s, clock.sampling.total_s, back_s)
    return StepTiming(outcome.submitted_at_s, outcome.arrived_at_s, tuple(shares), ends)


def on_one_clock(outcome: Outcome) -> tuple[StageTiming, ...]:
    """The stages' stamps, all of this host's clock.

    No two hosts' clocks are compared. How long a stage had the step, and how long it travelled inside one host, is
    measured; what is left of the whole way is shared evenly by the hops between hosts.
    """
    timings, derived = outcome.message.timings, _derived_hops(outcome)
    if not any(derived):
        return timings
    left = [outcome.submitted_at_s, *(timing.sent_at_s for timing in timings)]
    reached = [*(timing.received_at_s for timing in timings), outcome.arrived_at_s]
    hops = [0.0 if unknown else end - start for start, end, unknown in zip(left, reached, derived, strict=True)]
    stays = [timing.sent_at_s - timing.received_at_s for timing in timings]
    rest_s = max(0.0, outcome.arrived_at_s - outcome.submitted_at_s - sum(hops) - sum(stays))
    moved, now_s = [], outcome.submitted_at_s
    for timing, hop_s, stay_s, unknown in zip(timings, hops, stays, derived, strict=False):
        received_at_s = now_s + (rest_s / sum(derived) if unknown else hop_s)
        now_s = received_at_s + stay_s
        moved.append(with_changes(timing, received_at_s=received_at_s, sent_at_s=now_s))
    return tuple(moved)


def _derived_hops(outcome: Outcome) -> list[bool]:
    """For each hop, the way back included, whether it leads from one host to another."""
    hosts = [outcome.hosts[t.stage_index] if outcome.hosts else None for t in outcome.message.timings]
    return [before != after for before, after in zip([None, *hosts], [*hosts, None], strict=True)]


def step_record(
    outcome: Outcome, spans: Iterable[Span], clock: EndsClock, *, kind: StepKind, num_new_tokens: int = 0
) -> StepRecord:
    """The record of a step that came back and was worked off; `spans` are those that it was sent with."""
    message = outcome.message
    return StepRecord(
        step_id=message.step_id,
        kind=kind,
        spans=tuple(SpanRecord(span.sequence_id, span.start_pos, span.num_tokens) for span in spans),
        submitted_at_s=outcome.submitted_at_s,
        arrived_at_s=outcome.arrived_at_s,
        stages=on_one_clock(outcome),
        failed=isinstance(message, StepFailed),
        ends=clock.intervals(),
        num_new_tokens=num_new_tokens,
    )
