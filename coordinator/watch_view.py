"""A live panel in the terminal: how busy each stage is, what waits, what goes in and comes out."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.closing import Closing
from coordinator.log import one_line
from coordinator.plan import Plan
from coordinator.progress import ROOMY, cursor_restored
from coordinator.timing import EngineLoad, StepRecord
from coordinator.trace import stage_titles
from coordinator.watch import Meter, Numbers

DRAWS_PER_S = 2.0
"""Drawing takes the interpreter from what is being watched."""
LOOK_INTERVAL_S = 0.1
_BAR_WIDTH, _NARROW_BAR_WIDTH = 20, 8


class WatchView(Closing):
    """An observer of an engine that draws what it sees. A context manager; call it from the engine's thread.

    `below`, if anything, is drawn under the panel.
    """

    def __init__(
        self, plan: Plan, kv_budgets: Sequence[int], load: Callable[[], EngineLoad], stream: TextIO | None = None
    ) -> None:
        self.below: RenderableType = ""
        self._titles, self._kv_budgets = stage_titles(plan), kv_budgets
        self._ask_load, self._load = load, load()
        self._looked_at_s = 0.0
        self._meter = Meter(len(self._titles))
        self._event: tuple[str, float] | None = None
        self._lock = threading.Lock()  # the panel is drawn by a thread of its own, also while a step takes long
        self._console = Console(file=stream or sys.stderr, highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=DRAWS_PER_S,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._restored = cursor_restored(stream or sys.stderr)
        self._live.start(refresh=True)

    def __call__(self, record: StepRecord) -> None:
        """Take in a finished step."""
        with self._lock:
            self._meter.add(record)
            self._event = None
        self.look()

    def show(self, plan: Plan, kv_budgets: Sequence[int]) -> None:
        """The stages are others now."""
        with self._lock:
            self._titles, self._kv_budgets = stage_titles(plan), kv_budgets
            self._meter = Meter(len(self._titles))

    def tell(self, event: str) -> None:
        """Steps have stopped, for this reason; shown, with its age, until one comes back."""
        with self._lock:
            self._event = one_line(event), time.monotonic()

    def look(self) -> None:
        """Ask the engine how it is, unless that was a moment ago; worth a call where nothing is computed, too."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s >= LOOK_INTERVAL_S:
            self._looked_at_s = now_s
            self._load = self._ask_load()

    def close(self) -> None:
        """Take the panel from the terminal."""
        self._live.stop()
        self._restored.close()

    def _draw(self) -> RenderableType:
        with self._lock:
            now_s = time.monotonic()
            numbers = self._meter.numbers(now_s, self._load, is_stopped=self._event is not None)
            shown = [panel(numbers, self._titles, self._kv_budgets, self._console.width), self.below]
            if self._event is not None:
                shown.insert(0, Text(f"for {now_s - self._event[1]:.0f} s: {self._event[0]}", style="bold"))
            return Group(*shown)


def panel(numbers: Numbers, titles: Sequence[str], kv_budgets: Sequence[int], width: int = ROOMY) -> RenderableType:
    """What `--watch` shows: two lines about everything, a row for each process; in `width` columns, nothing cut off."""
    is_roomy = width >= ROOMY
    bar_width = _BAR_WIDTH if is_roomy else _NARROW_BAR_WIDTH
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", overflow="fold")
    for name in ("busy", "steps queued" if is_roomy else "queued", "KV tokens"):
        table.add_column(name, justify="left" if name == "busy" else "right", no_wrap=True)
    table.add_row("coordinator", _bar(numbers.coordinator_busy, bar_width), "", "")
    for title, stage, budget in zip(titles, numbers.stages, kv_budgets, strict=True):
        table.add_row(title, _bar(stage.busy, bar_width), f"{stage.num_queued:.1f}", f"{stage.kv_tokens} of {budget}")
    return Group(Text("\n".join(lines(numbers))), table)


def lines(numbers: Numbers) -> tuple[str, str]:
    """What goes in and comes out; how many sequences there are, and what else is held."""
    load = numbers.load
    kept = f"{load.num_kept_prefixes} prefix{'' if load.num_kept_prefixes == 1 else 'es'} kept"
    return (
        f"in {numbers.tokens_in_per_s:.1f} tokens/s, out {numbers.tokens_out_per_s:.1f} tokens/s, "
        f"{numbers.steps_per_s:.1f} steps/s, {numbers.steps_in_flight:.1f} in flight",
        f"{load.num_running} running, {load.num_waiting} waiting, {load.kv_tokens_held} of {load.kv_budget_tokens} KV "
        f"tokens, {kept}" + (f" ({load.kept_tokens} tokens)" if load.kept_tokens else ""),
    )


def _bar(share: float, width: int) -> Text:
    filled = round(width * min(1.0, share))
    text = Text()
    text.append("█" * filled, style="cyan")
    text.append("·" * (width - filled), style="dim")
    return text.append(f" {share:4.0%}")
