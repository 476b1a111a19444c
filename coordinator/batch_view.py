"""What a terminal shows while a long piece of work is done: a bar with tokens/s and the time left, elsewhere lines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from coordinator.closing import Closing
from coordinator.progress import ROOMY, cursor_restored

if TYPE_CHECKING:
    from coordinator.watch_view import WatchView

PLAIN_INTERVAL_S = 10.0
"""Without a terminal, a line is written at most this often."""
DRAWS_PER_S = 2.0
"""On one, the bar is drawn so often: drawing takes the interpreter from what is being shown."""


@dataclass(slots=True)
class Totals:
    """What a run has done so far; `num_done` includes what failed by itself."""

    num_done: int = 0
    num_failed: int = 0
    num_tokens: int = 0


class WorkView(Closing):
    """Shows how much of something is done. A context manager around the work, which keeps `totals` up to date."""

    def __init__(
        self,
        stream: TextIO,
        unit: str,
        total: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        panel: WatchView | None = None,
        *,
        has_bar: bool = True,
        is_silent: bool = False,
    ) -> None:
        """`unit` names what is counted, in the plural. `done` of `total` were done before this run.

        The bar is drawn under `panel` if there is one. Without `has_bar` lines are written on a terminal, too.
        """
        self.totals = Totals()
        self._stream, self._unit, self._total, self._done_before = stream, unit, total, done
        self._clock = clock
        self._started_at_s = clock()
        self._bar = _Bar(stream, unit, total, panel) if stream.isatty() and has_bar and not is_silent else None
        self._interval_s = PLAIN_INTERVAL_S if self._bar is None else 1 / DRAWS_PER_S
        self._due_s = math.inf if is_silent else self._started_at_s + self._interval_s

    @property
    def tokens_per_s(self) -> float:
        """Since this view was made."""
        elapsed_s = self._clock() - self._started_at_s
        return self.totals.num_tokens / elapsed_s if elapsed_s > 0 else 0.0

    def update(self) -> None:
        """Show the totals, if it is time to."""
        now_s = self._clock()
        if now_s < self._due_s:
            return
        self._due_s = now_s + self._interval_s
        done_now, num_failed = self.totals.num_done, self.totals.num_failed
        done = self._done_before + done_now
        left_s = (now_s - self._started_at_s) / done_now * (self._total - done) if done_now else math.inf
        text = f"{self.tokens_per_s:.1f} tokens/s, {time_left(left_s)}"
        text += f", {num_failed} failed" if num_failed else ""
        if self._bar is not None:
            self._bar.draw(done, text)
        else:
            print(f"{done}/{self._total} {self._unit}, {text}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class _Bar:
    def __init__(self, stream: TextIO, unit: str, total: int, panel: WatchView | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        console = Console(file=stream, highlight=False)
        self._progress = Progress(
            BarColumn(bar_width=24 if console.width >= ROOMY else 8, complete_style="cyan", finished_style="green"),
            TextColumn(
                f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}, {{task.fields[text]}}", table_column=Column()
            ),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, text="")
        self._panel = panel
        self._restored = ExitStack()
        if panel is None:
            self._restored = cursor_restored(stream)
            self._progress.start()
        else:
            panel.below = self._progress

    def draw(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, text=text)
        if self._panel is None:
            self._progress.refresh()

    def close(self) -> None:
        if self._panel is None:
            self._progress.stop()
            self._restored.close()
        else:
            self._panel.below = ""


def time_left(seconds: float) -> str:
    """`0:42 left`, `3:07:00 left`; of an unknown time, nothing but that."""
    if not math.isfinite(seconds):
        return "time left unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} left" if hours else f"{minutes}:{rest:02} left"
