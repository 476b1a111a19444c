"""How a worker ends: the exit codes, which service managers and people read."""

from dataclasses import dataclass

EXIT_ASKED = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_LOST = 3
EXIT_REFUSED = 4


@dataclass(frozen=True, slots=True)
class Exit:
    """A decision to end, with the reason that the coordinator and the log are told."""

    code: int
    reason: str
