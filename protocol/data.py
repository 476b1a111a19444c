"""Data plane: coordinator -> stage 1 -> ... -> last stage -> coordinator, PUSH to PULL, each hop FIFO."""

from typing import Annotated, Literal

from msgspec import Meta

from protocol.errors import MessageError
from protocol.limits import (
    MAX_SPANS,
    MAX_STAGES,
    MAX_UPDATES,
    Count,
    Id,
    Index,
    PositiveCount,
    Seconds,
    Text,
    Total,
)
from protocol.records import Record, Variant, with_changes

StepFailureCode = Literal["cache_gap", "kv_budget", "unknown_sequence", "out_of_memory", "bad_step", "internal"]


class DropSequence(Variant, frozen=True):
    """Forget a sequence; one that is not held is ignored."""

    sequence_id: Id


class TruncateSequence(Variant, frozen=True):
    """Keep the first `length` cached tokens of a sequence."""

    sequence_id: Id
    length: Count


class ForkSequence(Variant, frozen=True):
    """Start `new_id` with the first `length` cached tokens of `source_id`; a held `new_id` is replaced."""

    source_id: Id
    new_id: Id
    length: Count


KvUpdate = DropSequence | TruncateSequence | ForkSequence
KvUpdates = Annotated[tuple[KvUpdate, ...], Meta(max_length=MAX_UPDATES)]


class Span(Record, frozen=True):
    """Consecutive tokens of one sequence: positions [start_pos, start_pos + num_tokens).

    `context_length` and `mask_position` describe a prefix-LM prompt; both None for causal models. `mask_position` None
    beside a `context_length` means that positions keep counting.
    """

    sequence_id: Id
    start_pos: Index
    num_tokens: PositiveCount
    context_length: Count | None
    mask_position: Index | None

    def __post_init__(self) -> None:
        if self.mask_position is not None and self.context_length is None:
            raise MessageError("a mask_position needs a context_length")


class StageTiming(Record, frozen=True):
    """What one stage did to a step. Times of that host's monotonic clock, comparable only with each other."""

    stage_index: Index
    received_at_s: Seconds
    compute_s: Seconds
    sent_at_s: Seconds
    kv_tokens: Total


StageTimings = Annotated[tuple[StageTiming, ...], Meta(max_length=MAX_STAGES)]


class Step(Record, frozen=True):
    """One forward pass for many sequences, with one float tensor [num_tokens, hidden_size]: all spans, concatenated.

    `updates` are applied in order before the spans. No sequence may have two spans in a step.
    """

    epoch: Id
    step_id: Id
    updates: KvUpdates
    spans: Annotated[tuple[Span, ...], Meta(max_length=MAX_SPANS)]
    timings: StageTimings

    def __post_init__(self) -> None:
        if len(self.spans) > 1 and len({span.sequence_id for span in self.spans}) < len(self.spans):
            raise MessageError("a sequence has two spans in one step")

    @property
    def num_tokens(self) -> int:
        """Rows of the tensor that travels with the step."""
        return sum([span.num_tokens for span in self.spans])

    def with_timing(self, timing: StageTiming) -> "Step":
        """The step as it goes on from a stage."""
        return Step(self.epoch, self.step_id, self.updates, self.spans, (*self.timings, timing))


class StepFailed(Record, frozen=True):
    """Travels in place of a step that a stage could not do; later stages apply its `updates` and nothing else."""

    epoch: Id
    step_id: Id
    stage_index: Index
    code: StepFailureCode
    text: Text
    updates: KvUpdates
    timings: StageTimings

    def with_timing(self, timing: StageTiming) -> "StepFailed":
        """The failure as it goes on from a stage."""
        return with_changes(self, timings=(*self.timings, timing))


DataMessage = Step | StepFailed
