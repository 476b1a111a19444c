"""What surrounds a stop by Ctrl-Z, and what a terminal gets of a model's words. On real terminals: tests/end_to_end."""

import contextlib
import io
import os
import signal

import pytest

from coordinator.chat_console import PlainConsole
from coordinator.terminal import HIDE_CURSOR, SHOW_CURSOR, AnswerWriter, around_stops, cursor_shown_while_stopped
from tests.coordinator.test_progress import Terminal

ESCAPE = "a\x1b[31m\x9b2J"
VISIBLE = "a\ufffd[31m\ufffd2J"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens around stops; this process itself is not stopped."""
    seen: list[str] = []

    def stop(_pid: int, number: int) -> None:
        assert signal.getsignal(number) == signal.SIG_DFL
        seen.append("stopped")

    monkeypatch.setattr(os, "kill", stop)
    return seen


def block(events: list[str], name: str) -> contextlib.AbstractContextManager[None]:
    return around_stops(lambda: events.append(f"{name} pauses"), lambda: events.append(f"{name} goes on"))


def test_the_newest_pauses_first_and_goes_on_last(events: list[str]) -> None:
    """As often as there is a stop; afterwards a stop is as it was."""
    with block(events, "a"), block(events, "b"):
        for _ in range(2):
            signal.raise_signal(signal.SIGTSTP)
    assert events == ["b pauses", "a pauses", "stopped", "a goes on", "b goes on"] * 2
    assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL


def test_blocks_may_end_in_any_order(events: list[str]) -> None:
    """A view that closes while workers run on takes nothing away from them."""
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    first.enter_context(block(events, "bars"))
    second.enter_context(block(events, "workers"))
    first.close()
    signal.raise_signal(signal.SIGTSTP)
    second.close()
    assert events == ["workers pauses", "stopped", "workers goes on"]
    assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL


def test_an_ignored_stop_stays_ignored(events: list[str]) -> None:
    """Whoever started this program so wanted it so."""
    before = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        with block(events, "a"):
            signal.raise_signal(signal.SIGTSTP)
        assert signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTSTP, before)
    assert events == []


@pytest.mark.usefixtures("events")
def test_a_shell_has_a_cursor_while_a_bar_is_stopped() -> None:
    """It is shown before the stop and hidden after it; elsewhere than on a terminal nothing is written."""
    reader, writer = os.pipe()

    class Tty(Terminal):
        def fileno(self) -> int:
            return writer

    with os.fdopen(reader, "rb") as pipe:
        with cursor_shown_while_stopped(Tty()), cursor_shown_while_stopped(io.StringIO()):
            signal.raise_signal(signal.SIGTSTP)
        os.close(writer)
        assert pipe.read() == SHOW_CURSOR + HIDE_CURSOR


def test_a_terminal_gets_no_escapes_and_a_pipe_the_text_as_it_is() -> None:
    """Of answers that are written piece by piece, in a chat whose questions come through a pipe, too."""
    for stream, text in ((Terminal(), VISIBLE), (io.StringIO(), ESCAPE)):
        writer = AnswerWriter(stream)
        for character in ESCAPE:
            writer.write(character)
        writer.end()
        assert stream.getvalue() == f"{text}\n"
        out = type(stream)()
        console = PlainConsole(io.StringIO(), out, io.StringIO())
        console.write(ESCAPE)
        console.end_answer()
        assert out.getvalue() == f"{text}\n"
