"""How a worker ends: the exit codes, which service managers and people read."""

from dataclasses import dataclass

EXIT_ASKED = 0
"""By the coordinator; by signal N it is 128 + N, as of every command."""
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_LOST = 3
EXIT_REFUSED = 4


def was_asked(code: int) -> bool:
    """Whether somebody wanted this end: the coordinator, or whoever sent a signal."""
    return code == EXIT_ASKED or code > 128


@dataclass(frozen=True, slots=True)
class Exit:
    """A decision to end, with the reason that the coordinator and the log are told."""

    code: int
    reason: str
