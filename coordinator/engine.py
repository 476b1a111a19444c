"""Turns waiting sequences into tokens: one call of `step` is one walk of the chain."""

import itertools

import torch

from coordinator.errors import GenerationError
from coordinator.pipeline import Outcome, Pipeline
from coordinator.scheduler import Chunk, next_step
from coordinator.sequence import Sequence
from coordinator.timing import EndsClock, StepTiming, step_timing
from glm.ends import Embedding, Head
from protocol.data import DropSequence, KvUpdate, Span, Step, StepFailed
from protocol.limits import MAX_UPDATES

EPOCH = 1
"""Rises with every change of the pipeline; a pipeline never changes yet."""


class Engine:
    """Both ends of the model, the chain between them, and the sequences being generated."""

    def __init__(self, embedding: Embedding, head: Head, pipeline: Pipeline, kv_budget_tokens: int) -> None:
        self.embedding = embedding
        self.head = head
        self._pipeline = pipeline
        self._kv_budget_tokens = kv_budget_tokens
        self._running: list[Sequence] = []
        self._updates: list[KvUpdate] = []
        self._step_ids = itertools.count(1)
        self._sequence_ids = itertools.count(1)

    def new_sequence_id(self) -> int:
        """An id that no sequence of this engine had before."""
        return next(self._sequence_ids)

    def add(self, sequence: Sequence) -> None:
        """Generate for this sequence from the next step on."""
        self._running.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Stop generating for it; the stages forget it before anything else they do."""
        if not sequence.is_finished:
            sequence.finish_reason = "cancelled"
        self._retire()

    @property
    def is_idle(self) -> bool:
        """Whether `step` would have nothing to compute."""
        return not self._running

    def step(self) -> list[tuple[Sequence, StepTiming | None]]:
        """Walk the chain once; returns each sequence that took part or ended, with what its step cost.

        Raises:
            StageLost: a stage is gone.
        """
        decision = next_step(self._running, self._kv_budget_tokens)
        for sequence in decision.rejected:
            sequence.error = self._over_budget(sequence, decision.held)
        took_part: list[tuple[Sequence, StepTiming | None]] = [(s, None) for s in decision.rejected]
        if decision.chunks:
            clock = EndsClock()
            outcome = self._walk(decision.chunks, clock)
            if isinstance(outcome.message, StepFailed):
                self._fail(decision.chunks, outcome.message)
            else:
                self._sample(decision.chunks, outcome, clock)
            timing = step_timing(outcome, clock)
            took_part += [(chunk.sequence, timing) for chunk in decision.chunks]
        self._retire()
        return took_part

    def prefill(self, sequence: Sequence) -> torch.Tensor:
        """Feed the whole prompt of an added sequence, without sampling; the last layer's [num_tokens, hidden_size].

        Raises:
            GenerationError: a stage could not do it.
        """
        parts = []
        while sequence.num_cached < sequence.num_prompt:
            decision = next_step([sequence], self._kv_budget_tokens)
            chunks = decision.chunks
            if not chunks:
                raise self._over_budget(sequence, decision.held)
            outcome = self._walk(chunks, EndsClock())
            if outcome.hidden is None:
                assert isinstance(outcome.message, StepFailed)
                self._fail(chunks, outcome.message)
                self._retire()
                assert sequence.error is not None
                raise sequence.error
            sequence.num_cached += chunks[0].num_tokens
            parts.append(outcome.hidden)
        return torch.cat(parts)

    def _walk(self, chunks: tuple[Chunk, ...], clock: EndsClock) -> Outcome:
        ids = [i for c in chunks for i in c.sequence.token_ids[c.start_pos : c.start_pos + c.num_tokens]]
        with clock.embedding:
            hidden = self.embedding.forward(torch.tensor(ids, dtype=torch.int64))
        updates = tuple(self._updates[:MAX_UPDATES])
        step = Step(EPOCH, next(self._step_ids), updates, tuple(_span(chunk) for chunk in chunks), ())
        self._pipeline.submit(step, hidden)
        del self._updates[: len(updates)]
        outcome = self._pipeline.collect(EPOCH)
        while outcome.message.step_id != step.step_id:  # of a step whose walk was interrupted, by Ctrl-C for example
            outcome = self._pipeline.collect(EPOCH)
        return outcome

    def _sample(self, chunks: tuple[Chunk, ...], outcome: Outcome, clock: EndsClock) -> None:
        assert outcome.hidden is not None
        ends = list(itertools.accumulate(chunk.num_tokens for chunk in chunks))
        wanted = [(chunk, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.completes]
        for chunk in chunks:
            chunk.sequence.num_cached += chunk.num_tokens
        if not wanted:
            return
        try:
            with clock.head:
                logits = self.head.forward(outcome.hidden[[row for _, row in wanted]])
        except (RuntimeError, MemoryError) as error:  # torch says so when a device has no memory left
            for chunk, _ in wanted:
                chunk.sequence.error = GenerationError(f"the coordinator could not compute the logits: {error}")
            return
        with clock.sampling:
            for (chunk, _), row in zip(wanted, logits, strict=True):
                chunk.sequence.append(chunk.sequence.sampler.sample(row))

    def _fail(self, chunks: tuple[Chunk, ...], failed: StepFailed) -> None:
        text = f"stage {failed.stage_index + 1} could not do the step ({failed.code}): {failed.text}"
        for chunk in chunks:
            chunk.sequence.error = GenerationError(text)

    def _over_budget(self, sequence: Sequence, held: int) -> GenerationError:
        return GenerationError(
            f"this request needs {len(sequence.token_ids)} tokens of KV cache; the tightest stage has "
            f"{self._kv_budget_tokens}, of which other requests hold {held}: shorten it, or raise kv_budget_tokens"
        )

    def _retire(self) -> None:
        for sequence in self._running:
            if sequence.is_finished:
                self._updates.append(DropSequence(sequence.sequence_id))
        self._running = [sequence for sequence in self._running if not sequence.is_finished]
        while self._updates and not self._running:
            self._walk((), EndsClock())  # nothing else would carry the news, and the stages would go on holding the KV


def _span(chunk: Chunk) -> Span:
    layout = chunk.sequence.layout
    return Span(
        sequence_id=chunk.sequence.sequence_id,
        start_pos=chunk.start_pos,
        num_tokens=chunk.num_tokens,
        context_length=None if layout is None else layout.context_length,
        mask_position=None if layout is None else layout.mask_position,
    )
