"""Where the time of a step went: pure, from the timings that the stages appended to it."""

from dataclasses import dataclass

from coordinator.pipeline import Outcome


@dataclass(frozen=True, slots=True)
class StageShare:
    """What one stage had of a step: seconds computing, seconds the step travelled to it, tokens cached after."""

    compute_s: float
    wire_s: float
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class StepTiming:
    """When a step ended (this host's monotonic clock), and each stage's share of it."""

    submitted_at_s: float
    arrived_at_s: float
    stages: tuple[StageShare, ...]


def step_timing(outcome: Outcome) -> StepTiming:
    """Each hop's travel counts for the stage it leads to, and the way back for the last one.

    All processes run on one host and share its monotonic clock, so the difference of two stamps is the hop.
    """
    shares, left_at_s = [], outcome.submitted_at_s
    timings = outcome.message.timings
    for position, timing in enumerate(timings):
        wire_s = max(0.0, timing.received_at_s - left_at_s)
        if position == len(timings) - 1:
            wire_s += max(0.0, outcome.arrived_at_s - timing.sent_at_s)
        shares.append(StageShare(timing.compute_s, wire_s, timing.kv_tokens))
        left_at_s = timing.sent_at_s
    return StepTiming(outcome.submitted_at_s, outcome.arrived_at_s, tuple(shares))
