"""The terminal while an answer is written: what is typed is not shown in the middle of it; and Ctrl-Z, at any time."""

import os
import shutil
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from glm.printable import PrintableStream


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """What is typed stays unseen until the block ends, and waits for whoever reads then. Ctrl-C and Ctrl-Z act as ever.

    Nothing happens where standard input or output is no terminal, or another job has it.
    """
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout)) or not _is_in_front(fd := sys.stdin.fileno()):
        yield
        return
    before = termios.tcgetattr(fd)
    quiet = [*before]
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # nor does Ctrl-C throw away what waits

    def put(settings: list[int | list[bytes | int]]) -> None:
        if _is_in_front(fd):  # in the background it would stop this process
            termios.tcsetattr(fd, termios.TCSANOW, settings)

    with around_stops(lambda: put(before), lambda: put(quiet)):
        put(quiet)
        try:
            yield
        finally:
            put(before)


@contextmanager
def around_stops(pause: Callable[[], None], resume: Callable[[], None]) -> Iterator[None]:
    """While the block runs, Ctrl-Z (SIGTSTP) does `pause` before it stops this process, and `resume` once it goes on.

    Such blocks nest, the innermost one pauses first. Nothing happens in other threads, or where SIGTSTP is ignored.
    """
    before = signal.getsignal(signal.SIGTSTP)
    if threading.current_thread() is not threading.main_thread() or before == signal.SIG_IGN:
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        pause()
        try:
            if callable(before):
                before(number, frame)
            else:
                _stop()
        finally:
            resume()

    signal.signal(signal.SIGTSTP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _stop() -> None:
    """Stop here, as without a handler; returns when the process goes on."""
    handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    try:
        os.kill(os.getpid(), signal.SIGTSTP)
    finally:
        signal.signal(signal.SIGTSTP, handler)


class AnswerWriter:
    """Writes what a model says, piece by piece: to a terminal what it may get, elsewhere the text as it is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._filter = PrintableStream() if is_terminal(stream) else None

    def write(self, text: str) -> None:
        """A piece, at once."""
        self._put(text if self._filter is None else self._filter.push(text))

    def end(self) -> None:
        """The answer is complete, or broken off: what was held back, and the end of the line."""
        self._put("\n" if self._filter is None else self._filter.flush() + "\n")

    def _put(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()


def columns(stream: object) -> int | None:
    """How wide a terminal is; None for what is none."""
    if not is_terminal(stream):
        return None
    return shutil.get_terminal_size().columns


def is_terminal(stream: object) -> bool:
    """Whether a standard stream is there, open, and a terminal."""
    try:
        return stream is not None and os.isatty(stream.fileno())  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return False


def _is_in_front(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
