"""What other hosts make a launch say: one line each, and not so many that they fill a log."""

import threading
import time
from collections.abc import Callable

from coordinator.log import one_line

MOST_NOTES = 20
INTERVAL_S = 60.0


class FewNotes:
    """Passes on so many notes in an interval, then says how many it has left out. Safe to use from several threads."""

    def __init__(self, sink: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._clock = clock
        self._until_s = clock() + INTERVAL_S
        self._num_notes = 0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> None:
        """A note, which may quote what a peer called itself: nothing in it acts on a terminal or begins a line."""
        with self._lock:
            now_s = self._clock()
            if now_s >= self._until_s:
                if self._num_notes > MOST_NOTES:
                    self._sink(f"{self._num_notes - MOST_NOTES} more notes about workers of other hosts were left out")
                self._until_s, self._num_notes = now_s + INTERVAL_S, 0
            self._num_notes += 1
            if self._num_notes <= MOST_NOTES:
                self._sink(one_line(text))
