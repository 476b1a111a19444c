"""Turns waiting sequences into tokens: `step` sends what may be on its way, then takes what came back."""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from coordinator.chain import Chain, InFlight
from coordinator.errors import GenerationError, StageLost
from coordinator.kept_prefixes import KeptPrefix, KeptPrefixes, find_reuse
from coordinator.next_tokens import next_tokens
from coordinator.pacing import Pacing
from coordinator.pipeline import Outcome, Pipeline
from coordinator.scheduler import Decision, SchedulerSettings, StepKind, admissible, next_step, with_drafts
from coordinator.sequence import Sequence
from coordinator.timing import EngineLoad, StepRecord, StepTiming, step_record, step_timing
from glm.ends import Embedding, Head
from glm.speculation import PromptLookup, StepCost
from protocol.data import DropSequence, ForkSequence, StepFailed, TruncateSequence

TookPart = list[tuple[Sequence, StepTiming | None]]


class Engine:
    """Both ends of the model, the chain between them, and the sequences being generated."""

    def __init__(self, embedding: Embedding, head: Head, pipeline: Pipeline, settings: SchedulerSettings) -> None:
        self.embedding = embedding
        self.head = head
        self.settings = settings
        self.observers: list[Callable[[StepRecord], None]] = []
        self.holds_answers = False
        """While true, prompts are fed and no answer goes on: for measuring one without the other."""
        self.pacing = Pacing(settings.max_steps_in_flight, settings.steps_in_flight)
        self._chain = Chain(embedding, pipeline)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._kept = KeptPrefixes()
        self._step_cost = StepCost()
        self._last_kind: StepKind = "decode"
        self._sequence_ids = itertools.count(1)
        self._is_suspended = False
        self._failed: list[Sequence] = []
        """Of whom no step could be made: told with the next outcome."""

    def new_sequence_id(self) -> int:
        """An id that no sequence of this engine had before."""
        return next(self._sequence_ids)

    def add(self, sequence: Sequence) -> None:
        """Generate for this sequence as soon as it fits."""
        if self.settings.speculate and sequence.drafter is None:
            sequence.drafter = PromptLookup(sequence.token_ids)
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Stop generating for it; the stages forget it before anything else they do, as they do in a new epoch."""
        if not sequence.is_finished:
            sequence.finish_reason = "cancelled"
        if not any(sequence is running for running in self._running) and sequence in self._waiting:
            self._waiting.remove(sequence)
        self._retire()

    def forget_prefixes(self) -> None:
        """Let the stages drop whatever ended sequences left there."""
        self._chain.updates += map(DropSequence, self._kept.evict(self._kept.num_tokens))
        self._retire()

    def suspend(self) -> None:
        """The pipeline is lost: until `start_over` sequences may come and be cancelled, and stages are told nothing.

        In a new epoch they have forgotten every sequence anyway.
        """
        self._is_suspended = True

    def start_over(self, epoch: int) -> int:
        """The pipeline is another one: all running sequences are fed again from their token ids; how many they are."""
        self._chain.start_over(epoch)
        self._is_suspended = False
        self._kept = KeptPrefixes()
        running = [sequence for sequence in self._running if not sequence.is_finished]
        self._wait_again(running)
        self._running = []
        return len(running)

    def resize(self, kv_budgets: tuple[int, ...]) -> None:
        """There are so many stages now, each with its own KV budget in tokens."""
        most = len(kv_budgets) + 1
        self.settings = replace(self.settings, kv_budget_tokens=min(kv_budgets), max_steps_in_flight=most)
        self.pacing = Pacing(most, self.settings.steps_in_flight)

    def fail_all(self, reason: str) -> list[Sequence]:
        """End every request with this reason; the pipeline is gone, so that nothing is to be told to it."""
        failed = [*self._running, *self._waiting]
        for sequence in failed:
            sequence.error = sequence.error or GenerationError(reason)
        self._running, self._waiting = [], []
        return failed

    @property
    def is_idle(self) -> bool:
        """Whether `step` would have nothing to compute."""
        return not self._running and not self._waiting

    def queue(self, start: int = 0, most: int | None = None) -> list[tuple[int, Sequence]]:
        """Those that wait, each with its place from 1: `most` of them at most, behind the first `start`."""
        end = None if most is None else start + most
        return list(enumerate(self._waiting[start:end], start=start + 1))

    def load(self) -> EngineLoad:
        """What is going on, in numbers."""
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_tokens_held=sum(sequence.num_held for sequence in self._running),
            kv_budget_tokens=self.settings.kv_budget_tokens,
            steps_in_flight=len(self._chain),
            num_kept_prefixes=len(self._kept),
            kept_tokens=self._kept.num_tokens,
        )

    def step(self) -> TookPart:
        """Fill the chain, then take one outcome; each sequence that took part or ended, with what its step cost.

        Raises:
            StageLost: a stage is gone.
        """
        with self._chain.doubted():
            rejected = self._admit()
            took_part: TookPart = []
            while not took_part:  # steps that carry updates only are nobody's
                self._fill()
                if not len(self._chain):
                    rejected += self._reject_stuck()
                    break
                took_part = self._take(*self._chain.collect())
        failed, self._failed = self._failed, []
        self._retire()
        return [*((sequence, None) for sequence in (*rejected, *failed)), *took_part]

    def prefill(self, sequence: Sequence) -> torch.Tensor:
        """Feed the whole prompt of an added sequence, alone, without sampling; the last layer's [num_tokens, hidden].

        Raises:
            GenerationError: a stage could not do it.
        """
        self._waiting.remove(sequence)
        self._running.append(sequence)
        parts = []
        with self._chain.doubted():
            while sequence.num_sent < sequence.num_prompt and sequence.error is None:
                self._send(next_step([sequence], self.settings, kind="prefill"))
                if sequence.error is not None:
                    break
                flight, outcome = self._chain.collect()
                while not flight.chunks:  # carried updates only
                    flight, outcome = self._chain.collect()
                if outcome.hidden is None:
                    self._fail(flight, outcome)
                else:
                    parts.append(outcome.hidden)
        self._retire()
        if sequence.error is not None:
            raise sequence.error
        return torch.cat(parts)

    # -- what to send

    def _admit(self) -> list[Sequence]:
        """Whoever fits starts; returns one that never will, because it does not fit even alone."""
        for sequence in admissible(self._waiting, self._running, self.settings):
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._reuse(sequence)
            self.pacing.disturb()
        self._running.sort(key=lambda sequence: sequence.sequence_id)
        if self._running or not self._waiting:
            return []
        return [self._over_budget(self._waiting.pop(0))]

    def _reuse(self, sequence: Sequence) -> None:
        """Let it go on from what an ended sequence left, or copy what a running one has, where they begin alike."""
        if not self.settings.reuse or sequence.layout is not None or sequence.wants_prompt_logprobs:
            return
        others = [s for s in self._running if s is not sequence and s.layout is None]
        running = [KeptPrefix(other.kv_id, tuple(other.token_ids[: other.num_sent])) for other in others]
        reuse = find_reuse(sequence.token_ids, self._kept, running, self._room())
        if reuse is None:
            return
        if reuse.takes_over:
            self._kept.take(reuse.source)
            sequence.kv_id = reuse.source
            self._chain.updates.append(TruncateSequence(reuse.source, reuse.num_tokens))
        else:
            self._make_room()  # the stages check their budget when they copy, not once the whole step is done
            self._chain.updates.append(ForkSequence(reuse.source, sequence.kv_id, reuse.num_tokens))
        sequence.num_sent = sequence.num_cached = sequence.num_held = reuse.num_tokens
        sequence.num_reused = min(reuse.num_tokens, sequence.num_prompt)

    def _fill(self) -> None:
        """Send steps until as many are on their way as may be, or there is nothing to feed."""
        while len(self._chain) < self.settings.max_steps_in_flight and self._send_next():
            pass

    def _fill_ahead(self) -> None:
        """Send what new tokens allow before anything else is done with them: the stages need not wait for that."""
        self._retire()
        with contextlib.suppress(StageLost):  # said by the next step; what came of this one is not to be lost
            self._fill()

    def _send_next(self) -> bool:
        """Send one more step if there is anything to feed: prompts and answers take turns."""
        kinds: tuple[StepKind, StepKind] = ("prefill", "decode")
        for kind in kinds if self._last_kind == "decode" else reversed(kinds):
            decision = self._decide(kind)
            for sequence in decision.set_back:
                self._set_back(sequence)
            if decision.chunks:
                self._send(decision)
                return True
        return False

    def _decide(self, kind: StepKind) -> Decision:
        if kind == "prefill":
            return next_step(self._running, self.settings, kind="prefill")
        num_decoding = 0 if self.holds_answers else sum(not sequence.is_prefilling for sequence in self._running)
        steps = self.pacing.choose(num_decoding)
        if not num_decoding or self._chain.num_in_flight("decode") >= steps:
            return Decision("decode")
        share = -(-num_decoding // steps)
        decision = next_step(self._running, self.settings, kind="decode", most_decoding=share)
        return self._with_drafts(decision) if self.settings.speculate else decision

    def _with_drafts(self, decision: Decision) -> Decision:
        drafts: list[tuple[int, ...]] = []
        num_tokens = len(decision.chunks)
        for sequence in (chunk.sequence for chunk in decision.chunks):
            drafted: list[int] = []
            if sequence.drafter is not None:
                most = min(sequence.draft_length.choose(self._step_cost, num_tokens - 1), sequence.most_growth - 1)
                drafted = sequence.drafter.draft(most) if most > 0 else []
            drafts.append(tuple(drafted))
            num_tokens += len(drafted)
        taken = sum(max(sequence.num_reserved, len(sequence.token_ids)) for sequence in self._running)
        room = min(self.settings.kv_budget_tokens - taken, self.settings.max_step_tokens - len(decision.chunks))
        return with_drafts(decision, room, drafts)

    def _set_back(self, sequence: Sequence) -> None:
        """The newest gives way to the older ones; it is computed again when there is room."""
        self._chain.updates.append(DropSequence(sequence.kv_id))
        sequence.num_set_back += 1
        self._wait_again([sequence])

    def _wait_again(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.start_over()
        self._running = [sequence for sequence in self._running if sequence not in sequences]
        self._waiting = sorted([*self._waiting, *sequences], key=lambda sequence: sequence.sequence_id)
        self.pacing.disturb()

    def _send(self, decision: Decision) -> None:
        growth = sum(max(0, c.end + len(c.drafted) - c.sequence.num_reserved) for c in decision.chunks)
        self._make_room(growth)
        try:
            self._chain.send(decision.kind, decision.chunks)
        except GenerationError as error:
            for chunk in decision.chunks:
                chunk.sequence.error = error
                self._failed.append(chunk.sequence)
            return
        self._last_kind = decision.kind
        if decision.kind == "prefill":
            self.pacing.disturb()

    def _room(self) -> int:
        """Tokens of KV budget that neither running sequences nor kept prefixes have; negative where those must go."""
        taken = sum(sequence.num_reserved for sequence in self._running) + self._kept.num_tokens
        return self.settings.kv_budget_tokens - taken

    def _make_room(self, growth: int = 0) -> None:
        """Let the stages drop kept prefixes until the running sequences fit, and `growth` tokens more."""
        self._chain.updates += map(DropSequence, self._kept.evict(growth - self._room()))

    # -- what came back

    def _take(self, flight: InFlight, outcome: Outcome) -> TookPart:
        num_before = sum(len(chunk.sequence.token_ids) for chunk in flight.chunks)
        if outcome.hidden is None:
            self._fail(flight, outcome)
        elif flight.chunks:
            next_tokens(self.head, flight.chunks, outcome.hidden, flight.clock)
        num_new = sum(len(chunk.sequence.token_ids) for chunk in flight.chunks) - num_before
        self._fill_ahead()
        timing = step_timing(outcome, flight.clock)
        if flight.kind == "decode":
            self._learn(flight, timing)
        if self.observers:
            kind = flight.kind or "updates"
            record = step_record(outcome, flight.spans, flight.clock, kind=kind, num_new_tokens=num_new)
            for observer in self.observers:
                observer(record)
        return [(chunk.sequence, timing) for chunk in flight.chunks]

    def _learn(self, flight: InFlight, timing: StepTiming) -> None:
        """What a step of this size costs, and how fast the sequences come along with so many steps in flight."""
        compute_s = sum(stage.compute_s for stage in timing.stages) + timing.ends.compute_s
        self._step_cost.observe(sum(len(chunk.token_ids) for chunk in flight.chunks), compute_s)
        num_decoding = sum(not sequence.is_prefilling for sequence in self._running)
        self.pacing.observe(num_decoding, len(flight.chunks), time.monotonic())

    def _fail(self, flight: InFlight, outcome: Outcome) -> None:
        failed = outcome.message
        assert isinstance(failed, StepFailed)
        text = f"stage {failed.stage_index + 1} could not do the step ({failed.code}): {failed.text}"
        for chunk in flight.chunks:
            if not chunk.sequence.is_finished:
                chunk.sequence.error = GenerationError(text)

    # -- who leaves

    def _reject_stuck(self) -> list[Sequence]:
        """A sequence that runs alone and cannot grow within the budget would wait for ever."""
        return [self._over_budget(sequence) for sequence in self._running[:1] if not sequence.is_finished]

    def _over_budget(self, sequence: Sequence) -> Sequence:
        sequence.error = GenerationError(
            f"this request needs {len(sequence.token_ids)} tokens of KV cache; the tightest stage has "
            f"{self.settings.kv_budget_tokens}: shorten it, or raise kv_budget_tokens"
        )
        return sequence

    def _retire(self) -> None:
        ended = [sequence for sequence in self._running if sequence.is_finished]
        for sequence in () if self._is_suspended else ended:
            self._leave(sequence)
        if ended:
            self.pacing.disturb()
        self._running = [sequence for sequence in self._running if not sequence.is_finished]
        if self.is_idle and self._chain.updates and not self._is_suspended:
            # A lost stage has forgotten everything anyway; what could not be sent goes along with the next step.
            with self._chain.doubted(), contextlib.suppress(StageLost, GenerationError):
                self._chain.flush()

    def _leave(self, sequence: Sequence) -> None:
        """What an answer leaves in the stages is kept for its next turn; of any other ending nothing is."""
        is_whole = sequence.error is None and sequence.finish_reason != "cancelled"
        is_kept = is_whole and self.settings.reuse and sequence.layout is None and not sequence.num_steps_in_flight
        if not is_kept:
            self._chain.updates.append(DropSequence(sequence.kv_id))
            return
        if sequence.num_held > sequence.num_cached:
            self._chain.updates.append(TruncateSequence(sequence.kv_id, sequence.num_cached))
        contained = self._kept.keep(sequence.kv_id, sequence.token_ids[: sequence.num_cached])
        self._chain.updates += map(DropSequence, contained)
