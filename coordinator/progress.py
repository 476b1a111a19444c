"""What a terminal shows while the stages load: a bar for each on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self, TextIO

from coordinator.closing import Closing
from coordinator.log import LineWriter, Log, lines_lost, shown, to_stderr
from coordinator.plan import Plan, StagePlan
from coordinator.terminal import SHOW_CURSOR, cursor_shown_while_stopped
from glm.signals import undone_at_signals

if TYPE_CHECKING:
    from coordinator.cluster_settings import StageProgress

ROOMY = 80
"""Columns of a terminal from which on bars have their whole width."""
PLAIN_INTERVAL_S = 3.0
"""Without a terminal, a loading stage is mentioned at most this often."""


class LoadView(Closing):
    """Where load progress and the workers' lines go. A context manager around the loading."""

    @abstractmethod
    def update(self, progress: StageProgress) -> None:
        """Show a stage's progress."""

    @abstractmethod
    def log(self, line: str) -> None:
        """Show a worker's line; works after the loading, too."""


def load_view(plan: Plan, stream: TextIO | None = None, log: Log | None = None) -> LoadView:
    """The view that suits `stream`, stderr by default; or `log`, if that is for programs, or shows little."""
    if log is not None and (log.is_json or log.is_quiet):
        return LogView(plan, log)
    stream = stream or sys.stderr
    return BarView(plan, stream) if stream.isatty() else PlainView(plan, stream)


class PlainView(LoadView):
    """Lines: when a stage is ready, and every few seconds while one is loading."""

    def __init__(self, plan: Plan, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._titles = plan, _titles(plan)
        self._write = to_stderr if stream is sys.stderr else LineWriter(lambda: stream, lines_lost)
        self._clock = clock
        self._due_s = dict.fromkeys(range(len(plan.stages)), clock() + PLAIN_INTERVAL_S)

    def update(self, progress: StageProgress) -> None:
        now_s = self._clock()
        if progress.ready is None and now_s < self._due_s[progress.stage_index]:
            return
        self._due_s[progress.stage_index] = now_s + PLAIN_INTERVAL_S
        state = f"{progress.layers_done}/{progress.layers_total} layers, {_size(progress)}"
        self.log(f"{self._titles[progress.stage_index]}: {state}")
        _explain(self._plan, progress, self.log)

    def log(self, line: str) -> None:
        self._write(shown(line))

    def close(self) -> None:
        pass


class LogView(LoadView):
    """An event for each of a stage's layers, and one when it is ready."""

    def __init__(self, plan: Plan, log: Log) -> None:
        self._plan = plan
        self._log = log

    def update(self, progress: StageProgress) -> None:
        number, stage = progress.stage_index + 1, self._plan.stages[progress.stage_index]
        done = f"{progress.layers_done}/{progress.layers_total} layers, {_size(progress)}"
        self._log.say(
            f"{_title(self._plan, number, stage)}: {done}",
            event="loading" if progress.ready is None else "ready",
            stage=number,
            device=stage.device,
            epoch=None if progress.ready is None else progress.ready.epoch,
        )
        _explain(self._plan, progress, self.log)

    def log(self, line: str) -> None:
        self._log.say(line)

    def close(self) -> None:
        pass


class BarView(LoadView):
    """One bar per stage, with layers and bytes. The workers' lines scroll above the bars."""

    def __init__(self, plan: Plan, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._plan, self._stream = plan, stream
        # Whatever draws on the terminal by then has taken the place of stderr, to print above what it draws.
        self._write = to_stderr if stream is sys.__stderr__ else LineWriter(lambda: stream, lines_lost)
        self._is_live = False
        self._restored = ExitStack()
        console = Console(file=stream, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column()),  # wraps where there is no room
            BarColumn(bar_width=16 if console.width >= ROOMY else 6, complete_style="cyan", finished_style="green"),
            TextColumn("{task.completed:.0f}/{task.total:.0f} layers"),
            TextColumn("{task.fields[size]}", table_column=Column()),
            console=console,
        )
        self._tasks = [
            self._progress.add_task(title, total=stage.layer_end - stage.layer_start, size="")
            for title, stage in zip(_titles(plan), plan.stages, strict=True)
        ]

    def update(self, progress: StageProgress) -> None:
        self._progress.update(
            self._tasks[progress.stage_index],
            completed=progress.layers_done,
            total=progress.layers_total,
            size=_size(progress),
        )
        _explain(self._plan, progress, self.log)

    def log(self, line: str) -> None:
        if not self._is_live:
            self._write(shown(line))
            return
        with contextlib.suppress(OSError):  # a terminal that is gone
            self._progress.console.print(shown(line), markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._restored.enter_context(cursor_restored(self._stream))
        self._progress.start()
        self._is_live = True
        return self

    def close(self) -> None:
        self._is_live = False
        self._progress.stop()
        self._restored.close()


def cursor_restored(stream: TextIO) -> ExitStack:
    """Around what hides a terminal's cursor: a signal that ends or stops the process brings it back."""
    stack = ExitStack()
    if stream.isatty():
        stack.enter_context(undone_at_signals(lambda: os.write(stream.fileno(), SHOW_CURSOR + b"\n")))
        stack.enter_context(cursor_shown_while_stopped(stream))
    return stack


def format_bytes(num_bytes: int) -> str:
    """`512 B`, `14.2 MB`, `3.3 GB`: powers of 1000, as disks and model cards count."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _size(progress: StageProgress) -> str:
    """What the weights take; once the stage is ready, also how long that took."""
    size = format_bytes(progress.weight_bytes)
    return size if progress.ready is None else f"{size}, ready in {progress.ready.load_s:.1f} s"


def _explain(plan: Plan, progress: StageProgress, log: Callable[[str], None]) -> None:
    """What computes in a stage, which is also where a slower way than possible is explained."""
    if progress.ready is not None:
        log(f"{_where(plan, progress.stage_index)} computes with {progress.ready.kernel_path}")


def _where(plan: Plan, index: int) -> str:
    """`stage 1`, with its place where there are several hosts."""
    stage = plan.stages[index]
    place = plan.place(stage.device, stage.host)
    return f"stage {index + 1}" if place == stage.device else f"stage {index + 1} ({place})"


def _titles(plan: Plan) -> list[str]:
    return [_title(plan, number, stage) for number, stage in enumerate(plan.stages, start=1)]


def _title(plan: Plan, number: int, stage: StagePlan) -> str:
    return f"stage {number} {plan.place(stage.device, stage.host)} {stage.layers_text} {stage.precision}"
