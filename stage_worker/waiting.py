"""What a worker says while nobody answers it: soon for the first time, then ever more rarely."""

import time
from collections.abc import Callable

from protocol.endpoints import ipc_path
from stage_worker.log import logger

FIRST_NOTE_S = 2.0
LONGEST_PAUSE_S = 600.0
FIRST_PAUSE_S = 10.0
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


class RefusalNotes:
    """What a worker is told again and again while it asks again and again: soon, then ever more rarely."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._text = ""
        self._pause_s = self._next_s = 0.0
        self._num_left_out = 0

    def say(self, text: str) -> None:
        """The same as before only where it was not said for a while; something else at once."""
        now_s = self._clock()
        if text == self._text and now_s < self._next_s:
            self._num_left_out += 1
            return
        again = f" ({self._num_left_out} times more since)" if text == self._text and self._num_left_out else ""
        self._pause_s = min(5 * self._pause_s, LONGEST_PAUSE_S) if text == self._text else FIRST_PAUSE_S
        self._text, self._next_s, self._num_left_out = text, now_s + self._pause_s, 0
        logger.warning("%s%s", text, again)

    def over(self) -> None:
        """It was let in: the next refusal is news."""
        self._text = ""


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
