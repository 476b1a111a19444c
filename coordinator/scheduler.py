"""Decides the next step from the state of the sequences: pure, no sockets, no clock."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from coordinator.sequence import Sequence
from protocol.limits import MAX_SPANS

PREFILL_CHUNK_TOKENS = 1024
"""Longest piece of a causal prompt fed at once, which bounds the memory of its attention; a prefix LM's stays whole."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start_pos, start_pos + num_tokens) of a sequence, to be fed in the next step."""

    sequence: Sequence
    start_pos: int
    num_tokens: int

    @property
    def completes(self) -> bool:
        """Whether all known tokens are fed after this, so that a new one can be sampled."""
        return self.start_pos + self.num_tokens == len(self.sequence.token_ids)


@dataclass(frozen=True, slots=True)
class Decision:
    """`chunks` make the next step; `rejected` sequences cannot go on within the KV budget.

    `held` is how many tokens of the budget the others take.
    """

    chunks: tuple[Chunk, ...]
    rejected: tuple[Sequence, ...]
    held: int


def next_step(running: AbstractSequence[Sequence], kv_budget_tokens: int) -> Decision:
    """A prompt is fed alone, first come first served; without one waiting, all sequences decode together.

    `running` is in order of arrival. Sequences whose tokens would exceed the budget, the newest first, are rejected:
    a request too large fails by itself. Of more sequences than a step can carry the oldest are fed.
    """
    live = [sequence for sequence in running if not sequence.is_finished]
    rejected: list[Sequence] = []
    held = 0
    for sequence in live:
        needed = len(sequence.token_ids)
        if held + needed > kv_budget_tokens:
            rejected.append(sequence)
        else:
            held += needed
    kept = [sequence for sequence in live if sequence not in rejected]
    prefill = next((s for s in kept if s.num_cached < s.num_prompt), None)
    fed = [prefill] if prefill is not None else kept[:MAX_SPANS]
    return Decision(tuple(_chunk(sequence) for sequence in fed), tuple(rejected), held)


def _chunk(sequence: Sequence) -> Chunk:
    remaining = len(sequence.token_ids) - sequence.num_cached
    size = remaining if sequence.layout is not None else min(remaining, PREFILL_CHUNK_TOKENS)
    return Chunk(sequence, sequence.num_cached, size)
