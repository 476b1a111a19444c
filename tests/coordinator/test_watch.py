"""The live panel's numbers: shares of time, rates, and what they look like."""

import io
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from coordinator.commands.session import told_of_events
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.timing import EngineLoad, Interval, SpanRecord, StepKind, StepRecord
from coordinator.watch import Meter
from coordinator.watch_view import WatchView, lines, panel
from protocol.data import StageTiming

PLAN = Plan((StagePlan("cpu", 0, 3, "fp32"), StagePlan("cpu", 3, 6, "fp32")), EndsPlan(*("cpu", "fp32") * 2, "cpu"))
BUSY = EngineLoad(4, 2, 100, 4096, 2, 1, 30)
IDLE = EngineLoad(0, 0, 0, 4096, 0, 1, 30)


def a_step(start_s: float, kind: StepKind = "decode", num_tokens: int = 4, num_new_tokens: int = 4) -> StepRecord:
    """0.25 s of embedding, 1 s on stage 1, 0.5 s of waiting, 0.25 s on stage 2; all of it takes 2 s."""
    return StepRecord(
        step_id=int(start_s * 4),
        kind=kind,
        spans=(SpanRecord(1, 0, num_tokens),),
        submitted_at_s=start_s,
        arrived_at_s=start_s + 2,
        stages=(
            StageTiming(0, start_s + 0.25, 1.0, start_s + 1.25, 10 + int(start_s)),
            StageTiming(1, start_s + 1.5, 0.25, start_s + 2, 20),
        ),
        failed=False,
        ends=(Interval("embed", start_s - 0.25, start_s),),
        num_new_tokens=num_new_tokens,
    )


def test_shares_and_rates_are_those_of_the_window() -> None:
    """Steps that follow one another, one a second: two are in flight, stage 1 is always busy, stage 2 a quarter.

    So it is to the last step, although nothing is known of those behind it.
    """
    meter = Meter(2, window_s=4.0)
    for second in range(20):
        meter.add(a_step(100.0 + second))
    numbers = meter.numbers(130.0, BUSY)
    assert [stage.busy for stage in numbers.stages] == pytest.approx([1.0, 0.25])
    assert [stage.num_queued for stage in numbers.stages] == pytest.approx([0.25, 0.5])
    assert [stage.kv_tokens for stage in numbers.stages] == [129, 20]
    assert numbers.coordinator_busy == pytest.approx(0.25)
    assert numbers.steps_in_flight == pytest.approx(2)
    assert (numbers.steps_per_s, numbers.tokens_out_per_s) == pytest.approx((1, 4))
    assert numbers.tokens_in_per_s == 0


def test_prompts_go_in_and_answers_come_out() -> None:
    """A prefill's tokens are those it fed; the token it may give counts as an answer's."""
    meter = Meter(2)
    meter.add(a_step(10.0, "prefill", num_tokens=256, num_new_tokens=1))
    numbers = meter.numbers(12.0, BUSY)
    assert numbers.tokens_in_per_s == pytest.approx(128)
    assert numbers.tokens_out_per_s == pytest.approx(0.5)


def test_an_idle_engine_calms_down() -> None:
    """Without work the window ends now, so that after a while nothing of the last steps is left in it."""
    meter = Meter(2, window_s=4.0)
    meter.add(a_step(100.0))
    assert meter.numbers(103.0, IDLE).stages[0].busy == pytest.approx(1 / 3)
    numbers = meter.numbers(110.0, IDLE)
    assert (numbers.stages[0].busy, numbers.steps_per_s, numbers.tokens_out_per_s) == (0, 0, 0)
    assert numbers.stages[0].kv_tokens == 110


def test_before_the_first_step_everything_is_zero() -> None:
    """And a step that took no time at all divides nothing by zero."""
    meter = Meter(2)
    assert meter.numbers(5.0, IDLE).steps_in_flight == 0
    meter.add(replace(a_step(7.0), arrived_at_s=7.0))
    assert meter.numbers(7.0, BUSY).steps_per_s == 0


def test_the_panel_has_a_row_for_each_process() -> None:
    """With its bar, its queue and its KV budget; above them, what goes in and out and who waits."""
    meter = Meter(2)
    meter.add(a_step(100.0))
    numbers = replace(meter.numbers(102.0, IDLE), load=BUSY)
    console = Console(file=io.StringIO(), width=100)
    console.print(panel(numbers, ["stage 1 (cpu, layers 1-3)", "stage 2 (cpu, layers 4-6)"], [4096, 2048]))
    assert isinstance(console.file, io.StringIO)
    first, second, _, coordinator, one, two = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert first == "in 0.0 tokens/s, out 2.0 tokens/s, 0.5 steps/s, 1.0 in flight"
    assert second == "4 running, 2 waiting, 100 of 4096 KV tokens, 1 prefix kept (30 tokens)"
    assert coordinator.startswith("coordinator")
    assert one.startswith("stage 1 (cpu, layers 1-3)  ██████████··········  50%")
    assert one.endswith("0.1  110 of 4096")
    assert two.endswith("0.2   20 of 2048")
    assert "2 prefixes kept" in lines(replace(numbers, load=replace(BUSY, num_kept_prefixes=2)))[1]


def test_the_terminal_is_left_as_it_was() -> None:
    """The panel is drawn while the view is open, again and again, and is gone when it closes."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, loads = Terminal(), itertools.repeat(BUSY)
    with WatchView(PLAN, [4096, 2048], loads.__next__, terminal) as view:
        view(a_step(100.0))
        view._live.refresh()
        assert "4 running" in terminal.getvalue()
        assert "\x1b[?25l" in terminal.getvalue()  # the cursor is hidden
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("4 running")


@contextmanager
def watched_by(view: WatchView) -> Iterator[Any]:
    """A mender whose events are said, and told to the view, within the block; afterwards as before."""
    said: list[str] = []
    mender = SimpleNamespace(on_event=said.append)
    with told_of_events(view, mender):  # type: ignore[arg-type] # all that is used
        yield mender
    assert said == ["lost stage 2\nstarting it again"]
    assert mender.on_event == said.append


def test_the_panel_follows_the_stages() -> None:
    """When others have taken a stage's layers it shows those that are left, and what they do."""
    terminal, loads = io.StringIO(), itertools.repeat(BUSY)
    with WatchView(PLAN, [4096, 2048], loads.__next__, terminal) as view:
        view(a_step(100.0))
        view.show(replace(PLAN, stages=(replace(PLAN.stages[0], layer_end=PLAN.num_layers),)), [1024])
        shown = io.StringIO()
        Console(file=shown, width=100).print(view._draw())
    assert f"layers 1-{PLAN.num_layers})" in shown.getvalue() and "of 1024" in shown.getvalue()
    assert "stage 2" not in shown.getvalue()


def test_the_panel_does_not_stand_still_while_a_stage_is_brought_back() -> None:
    """It says since when nothing goes on, and why, and what was busy calms down; until a step comes back."""

    def shown() -> str:
        console = Console(file=io.StringIO(), width=100)
        console.print(view._draw())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    now_s = time.monotonic()
    with WatchView(PLAN, [4096, 2048], itertools.repeat(BUSY).__next__, io.StringIO()) as view:
        view(a_step(now_s - 200.0))
        assert "out 2.0 tokens/s" in shown() and " 80% " in shown()
        with watched_by(view) as mender:
            mender.on_event("lost stage 2\nstarting it again")
        assert shown().startswith("for 0 s: lost stage 2 starting it again\nin 0.0 tokens/s, out 0.0 tokens/s")
        assert " 80% " not in shown()
        view(a_step(now_s))
        assert "lost stage 2" not in shown()
