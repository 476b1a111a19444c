"""What ended sequences left in the stages' KV caches, for those that begin with the same tokens: bookkeeping only."""

from collections import OrderedDict
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from coordinator.prefix_tree import PrefixTree, common_length


@dataclass(frozen=True, slots=True)
class KeptPrefix:
    """`kv_id` is what the stages call it; they hold exactly these tokens of it."""

    kv_id: int
    token_ids: tuple[int, ...]


MOST_KEPT = 4096
"""Of all lengths: short ones would never fill the stages' memory, and each costs some bookkeeping everywhere."""


class KeptPrefixes:
    """Ended sequences in order of their last use, the least recent first. Whoever needs room evicts them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, KeptPrefix] = OrderedDict()
        self._tree = PrefixTree()
        self.num_tokens = 0
        """Tokens the stages hold for them."""

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, kv_id: int, token_ids: AbstractSequence[int]) -> list[int]:
        """Remember a sequence; returns the kv ids of those that are forgotten for it: older ones that it contains, and
        the least recently used where there are too many.
        """
        new = KeptPrefix(kv_id, tuple(token_ids))
        forgotten = self._tree.contained_in(new.token_ids)
        for old_id in forgotten:
            self.take(old_id)
        self._kept[kv_id] = new
        self._tree.add(kv_id, new.token_ids)
        self.num_tokens += len(new.token_ids)
        return forgotten + [self._forget_oldest().kv_id for _ in range(len(self._kept) - MOST_KEPT)]

    def longest(self, token_ids: AbstractSequence[int]) -> tuple[KeptPrefix | None, int]:
        """One that shares most tokens from the start on, and how many; it counts as used now."""
        kv_id, num_shared = self._tree.longest(token_ids)
        if kv_id is None:
            return None, 0
        self._kept.move_to_end(kv_id)
        return self._kept[kv_id], num_shared

    def take(self, kv_id: int) -> None:
        """No longer kept: a running sequence has taken it over, or the stages are to drop it."""
        prefix = self._kept.pop(kv_id)
        self._tree.remove(prefix.token_ids)
        self.num_tokens -= len(prefix.token_ids)

    def evict(self, num_tokens: int) -> list[int]:
        """Forget the least recently used until `num_tokens` are free (or none is left); their kv ids."""
        evicted: list[int] = []
        while num_tokens > 0 and self._kept:
            prefix = self._forget_oldest()
            num_tokens -= len(prefix.token_ids)
            evicted.append(prefix.kv_id)
        return evicted

    def _forget_oldest(self) -> KeptPrefix:
        prefix = next(iter(self._kept.values()))
        self.take(prefix.kv_id)
        return prefix


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
