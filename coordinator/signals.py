"""Ctrl-C, SIGTERM and SIGHUP while a command works: they unwind the stack, but not where something is being brought up.

Before and after, `glm.signals` has them end the process at once.
"""

import importlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from glm.signals import NUMBERS, end_now

# Each step defers signals: without the names that `signal` makes of numbers, which take most of its time.
_plain = importlib.import_module("_signal")
_get_handler: Callable[[int], Any] = _plain.getsignal
_set_handler: Callable[[int, Any], Any] = _plain.signal
_NUMBERS = tuple(map(int, NUMBERS))


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt and the others SystemExit, so that `finally` clauses run.

    For work that has an end to tell: an answer to break off, a file to complete. Nothing changes in a process that
    handles signals in its own way.
    """
    numbers = [number for number in NUMBERS if signal.getsignal(number) is end_now]
    try:
        for number in numbers:
            signal.signal(number, _unwind)
        yield
    finally:
        for number in numbers:
            signal.signal(number, end_now)


def _unwind(number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """What signal handlers do is done at the end of the block, not inside it.

    For short blocks that acquire something and must get to the point where they can release it. Handlers run in the
    main thread only, so elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: handler for number in _NUMBERS if callable(handler := _get_handler(number))}
    try:
        for number in handlers:
            _set_handler(number, lambda number, _frame: arrived.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            _set_handler(number, handler)
        if arrived:
            handlers[signal.Signals(arrived[0])](arrived[0], None)
