"""Where a step is that does not come back, from what the stages say they have taken and done: pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.control import Pong

IDLE_HEARTBEATS = 10
"""Steps are under way, and no stage has had anything to do for so many heartbeats in a row: nothing comes any more. A
connection that lets nothing through for half as long is closed, and what was on it is gone."""
MOST_IDLE_BYTES = 2**18
"""Of hidden states under way: more may take a slow line that long."""


@dataclass(frozen=True, slots=True)
class Place:
    """A stage by its index, or the hop that leads there; the hop behind the last stage leads back to this host."""

    index: int
    is_hop: bool

    def suspect(self, num_stages: int) -> int:
        """The stage to begin with: the one at the end of the hop."""
        return min(self.index, num_stages - 1)

    def words(self, names: Sequence[str], endpoints: Sequence[str]) -> str:
        """`in stage 2 (...)`, or between which two, and which address should be reached there.

        `endpoints` are where each stage listens, and behind them where the outcomes are awaited.
        """
        if not self.is_hop:
            return f"in {names[self.index]}"
        ends = ["this host", *names, "this host"]
        come, go = ends[self.index : self.index + 2]
        return f"between {come} and {go}: can {endpoints[self.index]} be reached from there?"


def locate(num_sent: int, num_back: int, stages: Sequence[tuple[int, int]]) -> Place:
    """The place of the first step that does not come back.

    `stages` have (taken, done) so many steps of those sent. Whatever is behind that place has passed everything on, and
    what is before it may be held up by it: so the search begins behind.
    """
    sent_by = [num_sent, *(done for _, done in stages)]
    if num_back < sent_by[-1]:
        return Place(len(stages), is_hop=True)
    for index in reversed(range(len(stages))):
        taken, done = stages[index]
        if taken > done:
            return Place(index, is_hop=False)
        if taken < sent_by[index]:
            return Place(index, is_hop=True)
    return Place(0, is_hop=False)


class IdleWatch:
    """Whether steps that are under way have got lost: then all stages are idle, and remain so."""

    def __init__(self) -> None:
        self._counts: tuple[object, ...] = ()
        self._pongs: tuple[Pong, ...] = ()
        self._num_heartbeats = 0

    def look(self, num_sent: int, num_back: int, pongs: Sequence[Pong]) -> bool:
        """To be asked whenever nothing has come back; `pongs` are each stage's latest.

        A stage that has a step, even in a queue of its own, takes it at once, and is busy until it has passed it on.
        """
        counts = (num_sent, num_back, *((pong.epoch, pong.num_taken, pong.num_steps) for pong in pongs))
        is_idle = num_sent > num_back and all(p.state == "serving" and p.num_taken == p.num_steps for p in pongs)
        if counts != self._counts or not is_idle:
            self._counts, self._pongs, self._num_heartbeats = counts, tuple(pongs), 0
        elif all(new is not old for new, old in zip(pongs, self._pongs, strict=True)):
            self._pongs = tuple(pongs)
            self._num_heartbeats += 1
        return self._num_heartbeats >= IDLE_HEARTBEATS
