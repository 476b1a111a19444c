"""Short lines on stderr, one event each; the launcher puts the stage's name in front."""

import logging
import sys

logger = logging.getLogger("stage_worker")


class _OneLine(logging.Formatter):
    """An event is one line, whatever an error's text or a hostile frame brought along."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return " ".join(text.split())[:2000]


def set_up_logging() -> None:
    """Send this program's events to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
