"""Short lines on stderr, one event each; the launcher puts the stage's name in front.

Whoever can reach a socket could fill a disk with complaints: of one kind of event only so many lines are written in a
while, and the next one says how many were left out.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TextIO

from glm.printable import printable_line
from glm.standard_streams import num_lost_writes

MAX_LINES = 10
PERIOD_S = 10.0
"""At most MAX_LINES events of one kind are written in each period of so many seconds."""

logger = logging.getLogger("stage_worker")

facts: dict[str, str | int] = {}
"""What is known of this worker: `worker` and `device`; `stage` (from 1) and `epoch` while it is assigned."""


class _OneLine(logging.Formatter):
    """An event is one line without control characters, whatever an error's text or a hostile frame brought along."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return printable_line(" ".join(text.split()))[:2000]


class _OneObject(_OneLine):
    """An event is one JSON object, in ASCII, whatever stderr's encoding; `facts` say whose it is."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
                "level": record.levelname.lower(),
                "process": "worker",
                "pid": os.getpid(),
                **facts,
                "event": "log",
                "message": super().format(record),
            }
        )


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


class _Lines(logging.StreamHandler[TextIO]):
    """Lines that cannot be written, as when a disk is full, are lost and counted; the next one says how many."""

    num_lost = 0
    _is_written = True

    def emit(self, record: logging.LogRecord) -> None:
        if self.num_lost:
            text = "%d lines of this log could not be written"
            lost = logging.LogRecord(record.name, logging.WARNING, "", 0, text, (self.num_lost,), None)
            self.num_lost = 0 if self._write(lost, before="\n") else self.num_lost  # the line before may be torn
        if self.num_lost or not self._write(record):
            self.num_lost += 1

    def _write(self, record: logging.LogRecord, before: str = "") -> bool:
        lost_before, self._is_written = num_lost_writes(self.stream), True
        with suppress(OSError, ValueError):
            self.stream.write(before)
        super().emit(record)
        return self._is_written and num_lost_writes(self.stream) == lost_before

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - as logging has it
        self._is_written = False


def set_up_logging(*, as_json: bool = False) -> None:
    """Send this program's events to stderr, as lines for people or as JSON objects."""
    handler = _Lines(sys.stderr)
    handler.setFormatter(_OneObject("%(message)s") if as_json else _OneLine("%(levelname)s %(message)s"))
    handler.addFilter(RateLimit())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
