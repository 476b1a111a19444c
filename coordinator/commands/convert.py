"""`glmpipe convert`: quantise a model once, so that it loads at about the speed of reading it."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from coordinator.commands.session import say
from coordinator.errors import UsageError
from coordinator.planning import HEAD_PRECISION
from coordinator.progress import PLAIN_INTERVAL_S, cursor_restored, format_bytes

if TYPE_CHECKING:
    from glm.precision import Precision

HELP = "quantise a model into a directory that loads at about the speed of reading it"
EXAMPLES = """\
examples:
  glmpipe convert THUDM/chatglm2-6b --precision int4 --out chatglm2-int4
  glmpipe chat --model chatglm2-int4 --stages 2                # any split; int4 without saying so
  glmpipe convert chatglm2-int4 --check                        # read it all, compare checksums

The directory holds everything that the model needs: a file for each layer, the ends, tokenizer and config. The results
are those of quantising when loading, bit for bit.
"""
_PUBLISHED = "published"


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", metavar="MODEL", help="a model directory or hub id")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")
    parser.add_argument("--precision", metavar="P", help="of the layers: int8 or int4")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the directory to make, or an empty one")
    parser.add_argument(
        "--lm-head-precision",
        metavar="P",
        help=f"int8, int4, or {_PUBLISHED} to leave it as it is (default: {HEAD_PRECISION}; {_PUBLISHED} where the "
        "model was published quantised); the embedding stays as it is",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="default: all usable cores")
    parser.add_argument("--check", action="store_true", help="MODEL is a converted one: compare all its checksums")


def run(options: argparse.Namespace) -> int:
    """Convert, or check."""
    if options.check:
        return _check(options)
    if options.precision is None or options.out is None:
        raise UsageError("convert needs --precision and --out, such as --precision int4 --out chatglm2-int4")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads {options.threads} must be 1 or more")
    import torch

    from coordinator.worker_command import usable_cores
    from glm.convert import check_room, convert
    from glm.hub import resolve_description, resolve_model
    from glm.model_source import made_for

    precision = _quantized("--precision", options.precision)
    description = resolve_description(options.model, options.revision, say)
    head = options.lm_head_precision or (_PUBLISHED if made_for(description).is_quantized else HEAD_PRECISION)
    lm_head_precision = None if head == _PUBLISHED else _quantized("--lm-head-precision", head)
    check_room(description, options.out, precision, lm_head_precision)
    model_dir = resolve_model(options.model, options.revision, say)
    torch.set_num_threads(options.threads or usable_cores())
    started_s = time.monotonic()
    with progress_on(sys.stderr) as report:
        manifest = convert(model_dir, options.out, precision, lm_head_precision, report)
    num_bytes = sum(facts.num_bytes for facts in manifest.files.values())
    say(f"{options.out}: {format_bytes(num_bytes)} in {time.monotonic() - started_s:.0f} s")
    return 0


def _check(options: argparse.Namespace) -> int:
    given = [name for name in ("precision", "out", "lm_head_precision", "revision") if getattr(options, name)]
    if given:
        raise UsageError(f"--check only reads, so --{given[0].replace('_', '-')} would do nothing; drop it")
    from glm.converted import ConvertedCheckpoint, is_converted

    if not is_converted(Path(options.model)):
        raise UsageError(f"{options.model} is not a converted model: --check has nothing to compare it with")
    checkpoint = ConvertedCheckpoint(Path(options.model))
    with progress_on(sys.stderr) as report:
        checkpoint.check(report)
    facts = checkpoint.manifest.files.values()
    size = format_bytes(sum(file.num_bytes for file in facts))
    say(f"{options.model}: all {len(facts)} files ({size}) are as they were written")
    return 0


def _quantized(origin: str, text: str) -> Precision:
    from glm.precision import Precision

    try:
        precision = Precision(text.lower())
    except ValueError:
        precision = Precision.FP32
    if not precision.is_quantized:
        raise UsageError(f"{origin} {text}: choose int8 or int4; other precisions need no conversion")
    return precision


@contextmanager
def progress_on(stream: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; elsewhere a line every few seconds, none for what is done sooner."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TimeRemainingColumn())
    due_s = time.monotonic() + PLAIN_INTERVAL_S
    with (
        cursor_restored(stream),
        Progress(*columns, console=Console(file=stream), disable=not stream.isatty()) as progress,
    ):
        task = progress.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            nonlocal due_s
            progress.update(task, description=what, completed=done, total=total)
            if progress.disable and time.monotonic() > due_s:
                due_s = time.monotonic() + PLAIN_INTERVAL_S
                print(f"{what}: {format_bytes(done)} of {format_bytes(total)}", file=stream, flush=True)

        yield report
