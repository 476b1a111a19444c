"""Steps on their way along the stages: sent at one end, matched with what comes back at the other."""

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from coordinator.errors import GenerationError
from coordinator.pipeline import FIRST_STEP_ID, Outcome, Pipeline
from coordinator.recovery import Patience
from coordinator.scheduler import Chunk, StepKind
from coordinator.timing import EndsClock
from glm.ends import Embedding
from glm.errors import faults_as
from protocol.data import KvUpdate, Span, Step
from protocol.limits import MAX_UPDATES

FIRST_EPOCH = 1
"""The epoch rises with every change of the pipeline."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step on its way; `kind` is None for one that carries updates only."""

    step_id: int
    kind: StepKind | None
    chunks: tuple[Chunk, ...]
    spans: tuple[Span, ...]
    clock: EndsClock = field(default_factory=EndsClock)

    @property
    def num_tokens(self) -> int:
        """Of all chunks, drafted ones included."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)


class Chain:
    """The stages with what is on its way through them, first in, first out.

    `updates` wait here for the next step, which takes them along. A sequence's state changes once its step is out:
    interrupted before that, the same tokens are simply sent again, which the stages recognise by their positions.
    """

    def __init__(self, embedding: Embedding, pipeline: Pipeline) -> None:
        self.embedding = embedding
        self.updates: list[KvUpdate] = []
        self._epoch = FIRST_EPOCH
        self._pipeline = pipeline
        self._in_flight: deque[InFlight] = deque()
        self._is_doubtful = False
        self._patience = Patience()
        self._step_ids = itertools.count(FIRST_STEP_ID)

    def __len__(self) -> int:
        return len(self._in_flight)

    def num_in_flight(self, kind: StepKind) -> int:
        """How many steps of this kind are on their way."""
        return sum(flight.kind == kind for flight in self._in_flight)

    def send(self, kind: StepKind, chunks: tuple[Chunk, ...]) -> None:
        """Embed the chunks' tokens and send them as one step.

        Raises:
            GenerationError: they could not be embedded; nothing was sent.
        """
        self._submit(kind, chunks)

    def flush(self) -> None:
        """Send the updates although there is nothing to compute. Nobody waits for these steps' outcomes."""
        while self.updates:
            self._submit(None, ())

    def collect(self) -> tuple[InFlight, Outcome]:
        """The next outcome. Steps before it that never came back were lost by an interruption, and are sent again.

        Raises:
            StageLost: a stage is gone, or stuck.
        """
        if self._is_doubtful:
            self._submit(None, ())  # its outcome at least will come
            self._is_doubtful = False
        while True:
            outcome = self._pipeline.collect(self._epoch, self._limit_s)
            while self._in_flight and self._in_flight[0].step_id <= outcome.message.step_id:
                flight = self._in_flight.popleft()
                was_lost = flight.step_id < outcome.message.step_id
                for chunk in flight.chunks:
                    sequence = chunk.sequence
                    sequence.num_steps_in_flight -= 1
                    if was_lost:
                        sequence.num_sent = min(sequence.num_sent, chunk.start_pos)
                    else:
                        sequence.num_cached = chunk.end
                if not was_lost:
                    if flight.kind is not None:
                        self._patience.observe(flight.kind, flight.num_tokens, outcome.took_s)
                    return flight, outcome

    def start_over(self, epoch: int) -> None:
        """The stages have forgotten everything, and nothing that was on its way comes back."""
        self._epoch = epoch
        self._in_flight.clear()
        self.updates.clear()
        self._is_doubtful = False

    @contextmanager
    def doubted(self) -> Iterator[None]:
        """Whatever interrupts this block may have swallowed an outcome: `collect` must not wait for it afterwards."""
        try:
            yield
        except BaseException:
            self._is_doubtful = bool(self._in_flight)
            raise

    def _limit_s(self) -> float:
        """How long to wait for the stages to take a step, or for an outcome."""
        return self._patience.limit_s((flight.kind, flight.num_tokens) for flight in self._in_flight if flight.kind)

    def _submit(self, kind: StepKind | None, chunks: tuple[Chunk, ...]) -> None:
        """Send a step and remember it: both or neither, whatever interrupts."""
        updates = tuple(self.updates[:MAX_UPDATES])
        flight = InFlight(next(self._step_ids), kind, chunks, tuple(map(_span, chunks)))
        with flight.clock.embedding, faults_as(GenerationError, "the coordinator could not embed the tokens"):
            ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
            hidden = self.embedding.forward(torch.tensor(ids, dtype=torch.int64))
        step = Step(self._epoch, flight.step_id, updates, flight.spans, ())

        def sent() -> None:
            self._in_flight.append(flight)
            del self.updates[: len(updates)]
            for chunk in chunks:
                sequence = chunk.sequence
                sequence.num_sent = chunk.end
                sequence.num_held = chunk.end + len(chunk.drafted)
                sequence.num_steps_in_flight += 1
                sequence.last_step_id = flight.step_id

        self._pipeline.submit(step, hidden, self._limit_s, sent=sent)


def _span(chunk: Chunk) -> Span:
    layout = chunk.sequence.layout
    return Span(
        sequence_id=chunk.sequence.kv_id,
        start_pos=chunk.start_pos,
        num_tokens=chunk.num_tokens + len(chunk.drafted),
        context_length=None if layout is None else layout.context_length,
        mask_position=None if layout is None else layout.mask_position,
    )
