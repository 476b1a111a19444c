"""Where the time of a step went: the stages' shares, which they appended to it, and the coordinator's own."""

import time
from dataclasses import dataclass

from coordinator.pipeline import Outcome


@dataclass(frozen=True, slots=True)
class StageShare:
    """What one stage had of a step: seconds computing, seconds the step travelled to it, tokens cached after."""

    compute_s: float
    wire_s: float
    kv_tokens: int


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


class EndsClock:
    """Measures the coordinator's parts of one step: `with clock.head: ...`."""

    def __init__(self) -> None:
        self.embedding, self.head, self.sampling = Stopwatch(), Stopwatch(), Stopwatch()


class Stopwatch:
    """Runs while its block does; seconds add up."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._started_at_s = 0.0

    def __enter__(self) -> None:
        self._started_at_s = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.total_s += time.monotonic() - self._started_at_s


def step_timing(outcome: Outcome, clock: EndsClock) -> StepTiming:
    """Each hop's travel counts for the stage it leads to, and the way back for the last one.

    All processes run on one host and share its monotonic clock, so the difference of two stamps is the hop.
    """
    shares, left_at_s = [], outcome.submitted_at_s
    timings = outcome.message.timings
    back_s = max(0.0, outcome.arrived_at_s - timings[-1].sent_at_s) if timings else 0.0
    for position, timing in enumerate(timings):
        wire_s = max(0.0, timing.received_at_s - left_at_s)
        if position == len(timings) - 1:
            wire_s += back_s
        shares.append(StageShare(timing.compute_s, wire_s, timing.kv_tokens))
        left_at_s = timing.sent_at_s
    ends = EndsShare(clock.embedding.total_s, clock.head.total_s, clock.sampling.total_s, back_s)
    return StepTiming(outcome.submitted_at_s, outcome.arrived_at_s, tuple(shares), ends)
