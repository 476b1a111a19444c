"""How both programs end at a signal while there is nothing to tell and nothing to finish: at once, in the handler.

An exception out of a handler comes up wherever the interpreter happens to be: inside an import, which shows its
traceback; under C++ that called Python, which aborts the process; under somebody's bare `except`, which swallows it. So
nothing is raised here. What would outlive the process is entered for as long as it exists, and the handler undoes it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_undos: list[Callable[[], object]] = []


def end_at_signals() -> None:
    """From now on a signal ends the process, with exit code 128 + its number; one that is ignored (nohup) stays so.

    The first thing that a program does. Signals that were blocked until it does (`become_worker`) are let through.
    """
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end_now)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def end_now(number: int, _frame: FrameType | None) -> None:
    """The handler: undo what was entered, the newest first, and end. A second signal skips what takes its time."""
    try:
        while _undos:
            undo = _undos.pop()
            with suppress(Exception):
                undo()
    finally:
        os._exit(128 + number)


@contextmanager
def undone_at_signals(undo: Callable[[], object]) -> Iterator[None]:
    """`undo` is called if a signal ends the process within the block. It must bear that nothing was begun yet."""
    _undos.append(undo)
    try:
        yield
    finally:
        with suppress(ValueError):
            _undos.remove(undo)
