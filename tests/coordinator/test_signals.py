"""Signals unwind the stack, at moments where it can be unwound."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from coordinator.signals import signals_deferred, signals_unwind
from glm.signals import NUMBERS, end_at_signals, end_now


@pytest.fixture(autouse=True)
def _as_in_the_program() -> Iterator[None]:
    """With the handlers of `python -m coordinator`; whoever started the tests may have had signals ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    end_at_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    """To this very process; its handler runs before the next line."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_end_runs_finally_clauses(number: signal.Signals) -> None:
    """As Ctrl-C does, with the exit code that shells expect; afterwards everything is as before."""
    with pytest.raises(SystemExit) as caught, signals_unwind():
        send(number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is end_now


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup glmpipe launch` survives its terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_at_signals()
    with signals_unwind():
        send(signal.SIGHUP)


def test_who_handles_signals_keeps_doing_so() -> None:
    """A Python program that uses this package has its own way to end."""
    arrived = []
    signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    with signals_unwind():
        send(signal.SIGTERM)
    assert arrived == [signal.SIGTERM]


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_deferred_signal_is_raised_at_the_end_of_the_block(number: signal.Signals, kind: type[BaseException]) -> None:
    """Nested blocks too: the outermost one decides."""
    done = []
    with signals_unwind(), pytest.raises(kind), signals_deferred():
        with signals_deferred():
            send(number)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is end_now


PROGRAM = """
import os, signal, sys, time
from glm.signals import end_at_signals, undone_at_signals
end_at_signals()
def undo(text):
    print(text, flush=True)
    if text == "slow":
        os.kill(os.getpid(), signal.SIGTERM)
        print("never said")
undos = [undone_at_signals(each) for each in (lambda: undo("oldest"), lambda: 1 / 0, lambda: undo("slow"))]
with undos[0], undos[1], undos[2]:
    with undone_at_signals(lambda: undo("gone by then")):
        pass
    try:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            print("swallowed")
    finally:
        print("unwound")
"""


def test_nothing_is_raised_and_everything_undone() -> None:
    """The newest first, whatever fails among it; a second signal goes on with the next, and has its own exit code."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "slow\noldest\n", "")


def test_a_signal_that_came_while_it_was_blocked_is_not_lost() -> None:
    """Whoever replaces himself by a program blocks signals until that has its handlers."""
    code = (
        "import os, signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
        "os.kill(os.getpid(), signal.SIGTERM);"
        "from glm.signals import end_at_signals; end_at_signals(); print('lived')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "")


def test_without_a_signal_nothing_happens() -> None:
    """Neither in the main thread nor in another one, where handlers never run."""
    with signals_deferred():
        pass
    seen = []

    def elsewhere() -> None:
        with signals_deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [end_now]
