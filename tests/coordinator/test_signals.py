"""Signals unwind the stack, at moments where it can be unwound."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from coordinator.signals import leaving_on_signals, signals_deferred


@pytest.fixture(autouse=True)
def _as_on_a_terminal() -> Iterator[None]:
    """Whoever started the tests may have had signals ignored, as `nohup` and shells without job control do."""
    plain = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in plain.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    """To this very process; its handler runs before the next line."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_polite_end_runs_finally_clauses(number: signal.Signals) -> None:
    """As Ctrl-C does, with the exit code that shells expect; afterwards everything is as before."""
    with pytest.raises(SystemExit) as caught, leaving_on_signals():
        send(number)
    assert caught.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored() -> None:
    """`nohup glmpipe launch` survives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with leaving_on_signals():
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_deferred_signal_is_raised_at_the_end_of_the_block(number: signal.Signals, kind: type[BaseException]) -> None:
    """Nested blocks too: the outermost one decides."""
    done = []
    with leaving_on_signals(), pytest.raises(kind), signals_deferred():
        with signals_deferred():
            send(number)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
    assert seen == [signal.default_int_handler]
