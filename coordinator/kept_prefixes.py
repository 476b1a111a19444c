"""What ended sequences left in the stages' KV caches, for those that begin with the same tokens: bookkeeping only."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KeptPrefix:
    """`kv_id` is what the stages call it; they hold exactly these tokens of it."""

    kv_id: int
    token_ids: tuple[int, ...]


class KeptPrefixes:
    """Ended sequences in order of their last use, the least recent first. Whoever needs room evicts them."""

    def __init__(self) -> None:
        self._kept: dict[int, KeptPrefix] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_tokens(self) -> int:
        """Tokens the stages hold for them."""
        return sum(len(prefix.token_ids) for prefix in self._kept.values())

    def keep(self, kv_id: int, token_ids: AbstractSequence[int]) -> list[int]:
        """Remember a sequence; returns the kv ids of older ones that it contains, which are forgotten."""
        new = KeptPrefix(kv_id, tuple(token_ids))
        contained = [
            old.kv_id
            for old in self._kept.values()
            if common_length(old.token_ids, new.token_ids) == len(old.token_ids)
        ]
        for old_id in contained:
            del self._kept[old_id]
        self._kept[kv_id] = new
        return contained

    def longest(self, token_ids: AbstractSequence[int]) -> tuple[KeptPrefix | None, int]:
        """The one that shares most tokens from the start on, and how many; it counts as used now."""
        best, most = None, 0
        for prefix in self._kept.values():
            common = common_length(prefix.token_ids, token_ids)
            if common > most:
                best, most = prefix, common
        if best is not None:
            self._kept[best.kv_id] = self._kept.pop(best.kv_id)
        return best, most

    def take(self, kv_id: int) -> None:
        """No longer kept: a running sequence has taken it over."""
        del self._kept[kv_id]

    def evict(self, num_tokens: int) -> list[int]:
        """Forget the least recently used until `num_tokens` are free (or none is left); their kv ids."""
        evicted: list[int] = []
        while num_tokens > 0 and self._kept:
            kv_id, prefix = next(iter(self._kept.items()))
            del self._kept[kv_id]
            num_tokens -= len(prefix.token_ids)
            evicted.append(kv_id)
        return evicted


def common_length(first: AbstractSequence[int], second: AbstractSequence[int]) -> int:
    """How many tokens from the start on are the same: a search by halves, so that long texts cost little."""
    low, high = 0, min(len(first), len(second))
    first, second = tuple(first[:high]), tuple(second[:high])
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


LEAST_REUSED = 8
"""Copying what another sequence has cached is not worth it for fewer tokens."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """The first `num_tokens` of `source` are what a new sequence begins with; it takes the source over, or a copy."""

    source: int
    num_tokens: int
    takes_over: bool


def find_reuse(
    token_ids: AbstractSequence[int], kept: KeptPrefixes, running: AbstractSequence[KeptPrefix], room: int
) -> Reuse | None:
    """From where a new sequence can go on; at least its last token is left, whose logits are wanted.

    A kept prefix is taken over where nothing of it is lost, or where `room` tokens do not hold a copy.
    """
    most = len(token_ids) - 1
    best, num_kept = kept.longest(token_ids)
    num_kept = min(num_kept, most)
    lengths = [(min(most, common_length(other.token_ids, token_ids)), other.kv_id) for other in running]
    num_running, running_id = max(lengths, default=(0, 0))
    if max(num_kept, num_running) < LEAST_REUSED:
        return None
    if best is not None and num_kept >= num_running:
        return Reuse(best.kv_id, num_kept, takes_over=num_kept >= len(best.token_ids) - 1 or num_kept > room)
    return Reuse(running_id, num_running, takes_over=False)
