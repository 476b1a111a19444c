"""Load progress: lines that are neither too many nor too few, and bars on a terminal."""

import io

import pytest

from coordinator.cluster_settings import StageProgress
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.progress import BarView, PlainView, format_bytes, load_view
from protocol.control import Ready

PLAN = Plan(
    (StagePlan("cuda:0", 0, 12, "int8"), StagePlan("cpu", 12, 13, "fp32")),
    EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32"),
)
READY = Ready(1, 1, 2_500_000, 9_000_000, 1.25, "plain torch")


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_stage_is_mentioned_now_and_then_and_when_ready() -> None:
    """Not for every layer; ready always."""
    now_s = 0.0
    stream = io.StringIO()
    with PlainView(PLAN, stream, clock=lambda: now_s) as view:
        for layer in range(1, 12):
            now_s += 0.5
            view.update(StageProgress(0, layer, 12, layer * 1_000_000))
        view.update(StageProgress(1, 1, 1, 2_500_000, READY))
        view.log("[stage 2 cpu] hello")
    assert stream.getvalue().splitlines() == [
        "stage 1 cuda:0 1-12 int8: 6/12 layers, 6.0 MB",
        "stage 2 cpu 13 fp32: 1/1 layers, 2.5 MB, ready in 1.2 s",
        "stage 2 computes with plain torch",
        "[stage 2 cpu] hello",
    ]


def test_on_a_terminal_every_stage_has_a_bar_and_log_lines_stay_readable() -> None:
    """Lines are printed as they are, brackets and all, during the loading and after it."""
    stream = Terminal()
    with load_view(PLAN, stream) as view:
        assert isinstance(view, BarView)
        view.update(StageProgress(0, 3, 12, 1_500_000))
        view.update(StageProgress(1, 1, 1, 2_500_000, READY))
        view.log("[stage 2 cpu] [bold] hello")
    view.log("[stage 1 cuda:0] later")
    text = stream.getvalue()
    for part in ("stage 1 cuda:0 1-12 int8", "3/12 layers", "1.5 MB", "ready in 1.2 s", "later\n"):
        assert part in text
    assert "[stage 2 cpu] [bold] hello" in text


def test_the_view_follows_the_stream() -> None:
    """A pipe or a file gets no control characters."""
    assert isinstance(load_view(PLAN, io.StringIO()), PlainView)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000, "2.5 MB"), (13_400_000_000, "13.4 GB")],
)
def test_bytes_are_readable(num_bytes: int, text: str) -> None:
    """Powers of 1000."""
    assert format_bytes(num_bytes) == text
