"""What a terminal shows of a measurement: its progress, then a table and bars."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from coordinator.bench_report import BenchReport, PartReport
from coordinator.bench_streams import Reporter
from coordinator.progress import cursor_restored, format_bytes
from coordinator.watch_view import WatchView

_BAR_WIDTH, _NARROW_BAR_WIDTH = 24, 8
_DRAW_INTERVAL_S = 1.0
_WIDTH = 100  # where the stream is no terminal
_WIDE = 90  # columns that the whole table may take
_COLUMNS = ("part", "device", "layers", "precision", "compute", "wire", "busy", "weights", "resident")
_NARROW_COLUMNS = (_COLUMNS[:4], ("part", *_COLUMNS[4:]))


@contextmanager
def progress_on(stream: TextIO, panel: WatchView | None = None) -> Iterator[Reporter]:
    """A bar for each thing being done on a terminal, under the panel if there is one; elsewhere a line for each."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
        auto_refresh=False,  # a thread that draws would take time from what is measured
        disable=not stream.isatty(),
    )
    if panel is not None:
        panel.below = progress
        try:
            yield _reporter(progress, stream, refresh=lambda: None)
        finally:
            panel.below = ""
        return
    with cursor_restored(stream), progress:
        yield _reporter(progress, stream, refresh=progress.refresh)


def _reporter(progress: Progress, stream: TextIO, refresh: Callable[[], None]) -> Reporter:
    tasks: dict[str, TaskID] = {}
    drawn_at_s = 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal drawn_at_s
        if what not in tasks:
            if progress.disable:
                print(f"measuring: {what}", file=stream, flush=True)
            tasks[what] = progress.add_task(what, total=total)
            drawn_at_s = 0.0
        progress.update(tasks[what], completed=done)
        if time.monotonic() > drawn_at_s + _DRAW_INTERVAL_S:
            drawn_at_s = time.monotonic()
            refresh()

    return report


def show(report: BenchReport, stream: TextIO) -> None:
    """The figures, a table of the processes, and bars of a decode step and of both efficiencies."""
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else _WIDTH)
    for line in _headlines(report):
        console.print(line, markup=False)
    for columns in (_COLUMNS,) if console.width >= _WIDE else _NARROW_COLUMNS:
        console.print(_table(report, columns))
    for path in dict.fromkeys(part.kernel_path for _, part in _parts(report)):
        names = ", ".join(name for name, part in _parts(report) if part.kernel_path == path)
        console.print(f"{names}: {path}", markup=False, style="dim")
    bar_width = _BAR_WIDTH if console.width >= _WIDE else _NARROW_BAR_WIDTH
    for bar in (*_step_bars(report, bar_width), *_efficiency_bars(report, bar_width)):
        console.print(bar)


def _headlines(report: BenchReport) -> tuple[str, ...]:
    first, last = report.context
    streams = f"{report.streams} streams together" if report.streams > 1 else "1 stream"
    return (
        f"{report.model}, {report.precision}, {report.threads} threads, {streams}, torch {report.torch_version}",
        f"prefill  {report.prefill_tokens_per_s:10.1f} tokens/s   prompts of {report.prompt_tokens} tokens, "
        f"first token after {report.time_to_first_token_s:.2f} s",
        f"decode   {report.decode_tokens_per_s:10.1f} tokens/s   {1000 * report.decode_step_s:.1f} ms a step over "
        f"{report.new_tokens} steps, context {first} to {last}",
        *([] if report.pacing is None else [f"         {report.pacing}"]),
    )


def _table(report: BenchReport, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        is_text = name in ("part", "device", "layers", "precision")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for name, part in _parts(report):
        cells = {
            "part": name,
            "device": part.device,
            "layers": part.layers,
            "precision": part.precision,
            "compute": f"{part.compute_s:.2f} s",
            "wire": f"{part.wire_s:.2f} s",
            "busy": f"{part.busy_share:.1%}",
            "weights": format_bytes(part.weight_bytes),
            "resident": format_bytes(part.resident_bytes),
        }
        table.add_row(*(cells[column] for column in columns))
    return table


def _parts(report: BenchReport) -> list[tuple[str, PartReport]]:
    stages = [(f"stage {number}", stage) for number, stage in enumerate(report.stages, start=1)]
    return [*stages, ("ends", report.coordinator)]


def _step_bars(report: BenchReport, bar_width: int) -> list[Text]:
    """Where the time of a decode step goes; of several streams, whose steps overlap, how busy each part is."""
    decode_s = report.decode_step_s * report.new_tokens
    rows = [(name, part.decode_compute_s) for name, part in _parts(report)]
    title = "busy while decoding, a token of each stream"
    if report.streams == 1:
        title = "a decode step"
        rows.append(("wire", sum(stage.decode_wire_s for stage in report.stages)))
        rows.append(("the rest", max(0.0, decode_s - sum(seconds for _, seconds in rows))))
    lines = [Text(f"\n{title}", style="bold")]
    for name, seconds in rows:
        share = seconds / decode_s
        lines.append(_bar(bar_width, name, share, "cyan", f"{1000 * seconds / report.new_tokens:8.2f} ms {share:6.1%}"))
    return lines


def _efficiency_bars(report: BenchReport, bar_width: int) -> list[Text]:
    """How near both phases come to what the machine can do."""
    bandwidth, flops = report.read_bandwidth_bytes_per_s, report.matmul_flops_per_s
    step = format_bytes(report.step_weight_bytes)
    return [
        Text("\nof what the machine can do", style="bold"),
        _bar(
            bar_width,
            "decode",
            report.decode_efficiency,
            "green",
            f"{report.decode_efficiency:6.1%} of {bandwidth / 1e9:.1f} GB/s ({step} a step)",
        ),
        _bar(
            bar_width,
            "prefill",
            report.prefill_efficiency,
            "green",
            f"{report.prefill_efficiency:6.1%} of {flops / 1e12:.2f} TFLOP/s ({report.matmul_dtype} matmul)",
        ),
    ]


def _bar(width: int, name: str, share: float, style: str, text: str) -> Text:
    filled = round(width * min(1.0, max(0.0, share)))
    line = Text(f"{name:<12}")
    line.append("█" * filled, style=style)
    line.append("·" * (width - filled), style="dim")
    return line.append(f" {text}")
