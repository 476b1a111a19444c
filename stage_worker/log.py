"""Short lines on stderr, one event each; the launcher puts the stage's name in front.

Whoever can reach a socket could fill a disk with complaints: of one kind of event only so many lines are written in a
while, and the next one says how many were left out.
"""

import logging
import sys
import time
from collections.abc import Callable

MAX_LINES = 10
PERIOD_S = 10.0
"""At most MAX_LINES events of one kind are written in each period of so many seconds."""

logger = logging.getLogger("stage_worker")


class _OneLine(logging.Formatter):
    """An event is one line, whatever an error's text or a hostile frame brought along."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return " ".join(text.split())[:2000]


class RateLimit(logging.Filter):
    """Lets MAX_LINES events of each kind pass in a period. A kind is a format string: there are as many as calls."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write the event; adds to its text how many like it were not."""
        now_s, kind = self._clock(), str(record.msg)
        began_at_s, count = self._seen.get(kind, (now_s, 0))
        if now_s - began_at_s >= PERIOD_S:
            if count > MAX_LINES:
                record.msg = f"{record.getMessage()} ({count - MAX_LINES} more like it were left out before)"
                record.args = ()
            began_at_s, count = now_s, 0
        self._seen[kind] = (began_at_s, count + 1)
        return count < MAX_LINES


def set_up_logging() -> None:
    """Send this program's events to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s %(message)s"))
    handler.addFilter(RateLimit())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
