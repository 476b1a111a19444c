"""Decides who is admitted and what the next step carries: pure, no sockets, no clock."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Literal

from coordinator.plan import MAX_NUM_SEQS, PREFILL_CHUNK, Plan
from coordinator.sequence import Sequence
from protocol.limits import MAX_SPANS, MAX_TOKENS

HEADROOM_TOKENS = 16
"""Room that each running sequence must keep to grow when another is admitted: or it would soon be set back again."""

StepKind = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """What bounds the steps.

    `kv_budget_tokens` is the tightest stage's. `max_model_len` counts prompt and answer. `prefill_chunk` is the most
    prompt tokens of one step; a prefix LM's prompts travel whole all the same. `max_step_tokens` is what one message
    carries, of either kind. `max_steps_in_flight` counts all steps
    on their way along the chain. `steps_in_flight` fixes how many decode steps the sequences are dealt out to; None
    leaves that to measurement. `reuse` keeps what ended sequences cached for those that begin alike.
    """

    kv_budget_tokens: int
    max_num_seqs: int = MAX_NUM_SEQS
    max_model_len: int | None = None
    prefill_chunk: int = PREFILL_CHUNK
    max_step_tokens: int = MAX_TOKENS
    max_steps_in_flight: int = 2
    steps_in_flight: int | None = None
    speculate: bool = True
    reuse: bool = True


def scheduler_settings(plan: Plan, default_kv_budget_tokens: int, max_step_tokens: int) -> SchedulerSettings:
    """What a plan says of it; one step more than there are stages, so that none waits for the coordinator."""
    return SchedulerSettings(
        min(stage.kv_budget_tokens or default_kv_budget_tokens for stage in plan.stages),
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        prefill_chunk=min(plan.prefill_chunk, max_step_tokens),
        max_step_tokens=max_step_tokens,
        max_steps_in_flight=len(plan.stages) + 1,
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start_pos, start_pos + num_tokens) of a sequence, to be fed in the next step, then drafted ones."""

    sequence: Sequence
    start_pos: int
    num_tokens: int
    drafted: tuple[int, ...] = ()

    @property
    def token_ids(self) -> list[int]:
        """What is fed, drafted ids last."""
        return [*self.sequence.token_ids[self.start_pos : self.end], *self.drafted]

    @property
    def end(self) -> int:
        """Behind the last token that is not drafted."""
        return self.start_pos + self.num_tokens

    @property
    def completes(self) -> bool:
        """Whether all known tokens are fed after this, so that a new one can be sampled."""
        return self.end == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Decision:
    """`chunks` make the next step, of one kind only; `set_back` sequences lose what the stages hold of them."""

    kind: StepKind
    chunks: tuple[Chunk, ...] = ()
    set_back: tuple[Sequence, ...] = ()


def admissible(
    waiting: AbstractSequence[Sequence], running: AbstractSequence[Sequence], settings: SchedulerSettings
) -> list[Sequence]:
    """Those that may start now, in order of arrival: nobody overtakes one that does not fit yet.

    One that waits for the prompt of another (`leader`) does not hold up those behind it.
    """
    admitted: list[Sequence] = []
    num_running = len(running)
    taken = sum(sequence.num_reserved for sequence in running)
    headroom = sum(map(_headroom, running))
    for sequence in waiting:
        if sequence.leader is not None and not _is_led(sequence.leader):
            continue
        headroom += _headroom(sequence)
        needed = len(sequence.token_ids) + (headroom if num_running else 0)
        if num_running >= settings.max_num_seqs or taken + needed > settings.kv_budget_tokens:
            break
        admitted.append(sequence)
        num_running += 1
        taken += len(sequence.token_ids)
    return admitted


def _headroom(sequence: Sequence) -> int:
    return min(HEADROOM_TOKENS, sequence.most_growth)


def _is_led(leader: Sequence) -> bool:
    return leader.is_finished or leader.num_cached >= leader.num_prompt


def next_step(
    running: AbstractSequence[Sequence],
    settings: SchedulerSettings,
    *,
    kind: StepKind,
    most_decoding: int = MAX_SPANS,
) -> Decision:
    """The next step of this kind; without chunks when there is nothing to feed or all of it is on its way.

    Args:
        running: in order of arrival.
        most_decoding: so many sequences at most share a decode step.
    """
    if kind == "prefill":
        return Decision("prefill", _prefill(running, settings))
    return _decode(running, settings, most_decoding)


def _prefill(running: AbstractSequence[Sequence], settings: SchedulerSettings) -> tuple[Chunk, ...]:
    """Prompts in order of arrival, packed up to the chunk's size; a prefix LM's whole, at least one."""
    chunks: list[Chunk] = []
    room = settings.prefill_chunk
    for sequence in running:
        if not sequence.is_prefilling or sequence.is_finished:
            continue
        remaining = len(sequence.token_ids) - sequence.num_sent
        if sequence.layout is None:
            size = min(remaining, room)
        elif sequence.num_steps_in_flight or (chunks and remaining > room):
            continue
        else:
            size = remaining
        chunks.append(Chunk(sequence, sequence.num_sent, size))
        room -= size
        if room <= 0 or len(chunks) == MAX_SPANS:
            break
    return tuple(chunks)


def _decode(running: AbstractSequence[Sequence], settings: SchedulerSettings, most: int) -> Decision:
    """Whoever waited longest goes first. Growth beyond the budget sets back the newest sequences.

    One whose tokens are under way cannot be set back: those that would need its room wait until they are there.
    """
    ready = [s for s in running if not s.is_prefilling and not s.num_steps_in_flight and not s.is_finished]
    ready.sort(key=lambda sequence: (sequence.last_step_id, sequence.sequence_id))
    kept = list(running)
    set_back: list[Sequence] = []
    chunks: list[Chunk] = []
    taken = sum(sequence.num_reserved for sequence in running)
    for sequence in ready[: min(most, MAX_SPANS, settings.max_step_tokens)]:
        if sequence in set_back:
            continue
        growth = max(0, len(sequence.token_ids) - sequence.num_reserved)
        fed = {id(chunk.sequence) for chunk in chunks}
        while taken + growth > settings.kv_budget_tokens:
            victim = max(kept, key=lambda s: s.sequence_id)
            if victim.num_steps_in_flight or id(victim) in fed or (victim is sequence and len(kept) == 1):
                break
            kept.remove(victim)
            set_back.append(victim)
            taken -= victim.num_reserved
            if victim is sequence:
                break
        if sequence in set_back or taken + growth > settings.kv_budget_tokens:
            continue
        taken += growth
        chunks.append(Chunk(sequence, len(sequence.token_ids) - 1, 1))
    return Decision("decode", tuple(chunks), tuple(set_back))


def with_drafts(decision: Decision, room: int, drafts: AbstractSequence[tuple[int, ...]]) -> Decision:
    """The decision with drafted tokens behind each chunk, as far as KV budget and step have `room` for them."""
    chunks = []
    for chunk, drafted in zip(decision.chunks, drafts, strict=True):
        kept = drafted[: max(0, room)]
        room -= len(kept)
        chunks.append(Chunk(chunk.sequence, chunk.start_pos, chunk.num_tokens, kept))
    return Decision(decision.kind, tuple(chunks), decision.set_back)
