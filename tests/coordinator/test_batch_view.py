"""What a long run shows: lines without a terminal, a bar on one."""

import io

from coordinator.batch_view import WorkView, time_left
from coordinator.timing import EngineLoad
from coordinator.watch_view import WatchView
from tests.coordinator.test_watch import PLAN


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> None:
    """A run of 100 answers of which 20 were there before, with a clock of its own."""
    now_s = 0.0
    with WorkView(stream, "answers", 100, 20, clock=lambda: now_s) as view:
        for now_s in (1.0, 11.0, 12.0, 21.0):
            view.totals.num_done += 10
            view.totals.num_tokens += 330
            view.totals.num_failed = int(now_s > 20)
            view.update()


def test_lines_now_and_then() -> None:
    """Done of all, tokens/s of this run, the time left; failures when there are any."""
    stream = io.StringIO()
    shown(stream)
    assert stream.getvalue().splitlines() == [
        "40/100 answers, 60.0 tokens/s, 0:33 left",
        "60/100 answers, 62.9 tokens/s, 0:21 left, 1 failed",
    ]


def test_a_bar_on_a_terminal() -> None:
    """The same, drawn over itself."""
    stream = Terminal()
    shown(stream)
    assert "60/100 answers, 62.9 tokens/s" in stream.getvalue()


def test_a_bar_under_a_panel() -> None:
    """Drawn by the panel, and gone from there when the work is done."""
    stream = Terminal()
    load = EngineLoad(3, 0, 10, 100, 1, 0, 0)
    with WatchView(PLAN, [100, 100], lambda: load, stream) as panel:
        with WorkView(stream, "answers", 100, 20, clock=lambda: 0.0, panel=panel):
            panel._live.refresh()
            assert "20/100" not in stream.getvalue()
            assert "0/100 answers" in stream.getvalue()
            assert "3 running" in stream.getvalue()
        assert panel.below == ""


def test_time_left_reads_well() -> None:
    """Hours where there are any; unknown before anything is done."""
    assert [time_left(s) for s in (0, 42.4, 61, 3600, 11220)] == [
        "0:00 left",
        "0:42 left",
        "1:01 left",
        "1:00:00 left",
        "3:07:00 left",
    ]
    assert time_left(float("inf")) == "time left unknown"
