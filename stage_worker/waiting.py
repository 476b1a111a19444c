"""What a worker says while nobody answers it: soon for the first time, then ever more rarely."""

from protocol.endpoints import ipc_path
from stage_worker.log import logger

FIRST_NOTE_S = 2.0
LONGEST_PAUSE_S = 600.0
AFTER_AN_ANSWER_S = 60.0
"""Refusals are told when they come; that nobody answers is no news before they have stopped for so long."""


class WaitingNotes:
    """Counts the time without an answer of a coordinator, and says what may be the matter."""

    def __init__(self, endpoint: str, join_timeout_s: float | None, *, has_key: bool) -> None:
        self._endpoint = endpoint
        self._text = f"{_remedy(endpoint, has_key=has_key)}; {_patience(join_timeout_s)}"
        self._silent_s = 0.0
        self._next_s = FIRST_NOTE_S

    def wait(self, waited_s: float) -> None:
        """So much more time has gone by."""
        self._silent_s += waited_s
        if self._silent_s >= self._next_s:
            logger.info("nobody has answered at %s for %.0f s: %s", self._endpoint, self._silent_s, self._text)
            self._next_s = self._silent_s + min(5 * self._silent_s, LONGEST_PAUSE_S)

    def answered(self) -> None:
        """Somebody is there, if only to refuse."""
        self._silent_s, self._next_s = 0.0, AFTER_AN_ANSWER_S


def _remedy(endpoint: str, *, has_key: bool) -> str:
    if has_key:
        return "is `glmpipe launch --listen` running there, and do firewalls let this port through?"
    if ipc_path(endpoint) is not None:
        return "is the launch still running, and is this its control socket?"
    return (
        "is a launch running there? One that was started with --listen answers nobody without the --key that is in "
        "the command it printed"
    )


def _patience(join_timeout_s: float | None) -> str:
    if join_timeout_s is None:
        return "waiting for as long as it takes"
    return f"leaving if nobody has by {join_timeout_s:g} s (--join-timeout)"
