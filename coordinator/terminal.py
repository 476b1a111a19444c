"""The terminal while an answer is written: what is typed is not shown in the middle of it; and Ctrl-Z, at any time."""

import os
import shutil
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import TextIO

from glm.printable import PrintableStream
from glm.signals import undone_at_signals


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

    with undone_at_signals(lambda: put(before)), around_stops(lambda: put(before), lambda: put(quiet)):
        put(quiet)
        try:
            yield
        finally:
            put(before)


@contextmanager
def around_stops(pause: Callable[[], object], resume: Callable[[], object]) -> Iterator[None]:
    """While the block runs, Ctrl-Z (SIGTSTP) does `pause` before it stops this process, and `resume` once it goes on.

    Of several such blocks the newest pauses first; they may end in any order. Nothing happens in other threads than the
    main one, or where SIGTSTP is ignored.
    """
    if threading.current_thread() is not threading.main_thread() or _ignores_stops():
        yield
        return
    entry = (pause, resume)
    _around.append(entry)
    signal.signal(signal.SIGTSTP, _stop)
    try:
        yield
    finally:
        _around.remove(entry)
        if not _around:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)


_around: list[tuple[Callable[[], object], Callable[[], object]]] = []


def _ignores_stops() -> bool:
    return signal.getsignal(signal.SIGTSTP) not in (signal.SIG_DFL, _stop)


def _stop(number: int, _frame: FrameType | None) -> None:
    """Stop here, as without a handler; returns when the process goes on."""
    for pause, _ in reversed(_around):
        pause()
    signal.signal(number, signal.SIG_DFL)
    try:
        os.kill(os.getpid(), number)
    finally:
        signal.signal(number, _stop)
        for _, resume in _around:
            resume()


def cursor_shown_while_stopped(stream: TextIO) -> AbstractContextManager[None]:
    """Around what hides the cursor of a terminal while it draws: a shell has it in between."""
    if not is_terminal(stream):
        return nullcontext()
    return around_stops(lambda: _put(stream, SHOW_CURSOR), lambda: _put(stream, HIDE_CURSOR))


SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"


def _put(stream: TextIO, data: bytes) -> None:
    """To the descriptor itself: the program may be inside a print."""
    with suppress(OSError, ValueError):
        os.write(stream.fileno(), data)


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
        return stream is not None and bool(stream.isatty())  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return False


def _is_in_front(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
