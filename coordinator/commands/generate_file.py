"""`glmpipe generate --prompts`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

from coordinator.commands.options import sampling_overrides
from coordinator.commands.prompts import check_kind
from coordinator.commands.session import check_watch, log_of, opened, watched
from coordinator.errors import UsageError
from coordinator.terminal import is_terminal

if TYPE_CHECKING:
    from coordinator.batch import BatchBackend, Survey
    from coordinator.batch_view import WorkView
    from coordinator.chat_model import ChatModel
    from coordinator.client import RemoteBackend
    from coordinator.commands.session import Chosen
    from coordinator.conversation import ChatBackend
    from coordinator.watch_view import WatchView

STANDARD = "-"
"""In the place of a file: standard input, or output."""
REMOTE_SEQUENCES = 32
"""Taken for the most sequences at once of a launch that this command only connects to, and that may have others."""

HELP = """\
a file of prompts (--prompts) has a JSON object a line, with one of
  {"prompt": "..."}                                            a question (with --raw a text to continue)
  {"messages": [{"role": "user", "content": "..."}, ...]}      a conversation; a system message may have "tools"
  {"token_ids": [5, 64286, ...]}                               taken as they are
and, where wanted, "id", "n", "logprobs", and sampling options by their names ("max_new_tokens", "seed", "stop", ...),
which go before the command's. Every line is checked before a model is loaded.

--out (- for standard output) gets a JSON object for each answer, as soon as it is complete: "id", "line", "index" (of
n), "text", "token_ids", "finish_reason", "note" where the answer breaks off unasked, "prompt_tokens", "new_tokens",
"logprobs" where wanted, "prompt_digest", "model" (its name, files, precisions, chat format). A request that failed by
itself has "error" in place of its answer. The same command again does what is missing, failed ones included; an answer
is recognised by its "id", or else by the number of its prompt's line, and all must be of one model.
"""


def run_file(options: argparse.Namespace) -> int:
    """Check all prompts, launch or connect, answer what is missing; 1 if requests failed by themselves."""
    if str(options.prompts) == STANDARD:
        with _spooled() as options.prompts:
            return _run(options)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    _check(options)
    check_watch(options)
    from coordinator.batch import ANSWERS_OPEN, missing_jobs, run_batch, survey
    from coordinator.batch_prompts import BatchDefaults
    from coordinator.batch_results import ResultFile
    from coordinator.result_stream import ResultStream

    defaults = BatchDefaults(
        sampling_overrides(options), options.n, options.logprobs, options.raw, options.special_tokens
    )
    log = log_of(options)
    with ResultStream(sys.stdout) if str(options.out) == STANDARD else ResultFile(options.out) as results:
        found = survey(options.prompts, defaults, results)
        if results.num_cut_bytes:
            log.say(f"note: {options.out} ended within a line, as after a kill: {results.num_cut_bytes} bytes are cut")
        if not found.num_answers:
            log.say(f"{options.prompts} asks for nothing: it has no line with a prompt")
            return 0
        if not found.num_missing:
            log.say(f"{_answers(found.num_answers)} in {options.out} already: nothing is left to do")
            return 0
        identify = results.refuse_other_models
        with opened(
            options, found.wanted, lambda chosen: _check_found(found, options, chosen), identify=identify
        ) as opened_backend:
            backend, num_sequences = batch_backend(options, opened_backend)
            with _panel(options, opened_backend) as panel, _shown(options, found, panel) as view:
                jobs = missing_jobs(options.prompts, defaults, results)
                run_batch(backend, jobs, results, view, most_open=ANSWERS_OPEN * num_sequences)
    return 1 if view.totals.num_failed else 0


@contextmanager
def _spooled() -> Iterator[Path]:
    """Standard input as a file that can be read twice, which a pipe cannot."""
    with TemporaryDirectory(prefix="glmpipe-prompts-") as name:
        path = Path(name) / "standard input"
        try:
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        except OSError as error:
            raise UsageError(f"--prompts -: standard input cannot be kept in {name}: {error.strerror}") from None
        yield path


def _check(options: argparse.Namespace) -> None:
    if options.out is None:
        raise UsageError("--prompts needs --out: the file that the answers go to, or - for standard output")
    for name in ("json", "stats"):
        if getattr(options, name):
            raise UsageError(f"--{name} is about a single answer; with --prompts, drop it")
    if options.system is not None:
        raise UsageError(
            '--system is for one prompt; in a file of prompts, "messages" begin with {"role": "system", ...}'
        )
    if options.tools is not None:
        raise UsageError('--tools is for one prompt; in a file of prompts, the system\'s message has "tools": [...]')
    check_kind(options)
    if not options.prompts.exists():
        raise UsageError(f"--prompts {options.prompts}: there is no such file")
    if not options.prompts.is_file():
        raise UsageError(f"--prompts {options.prompts} is not a file; it is read twice: give a pipe as --prompts -")
    if str(options.out) != STANDARD and options.out.exists() and options.out.samefile(options.prompts):
        raise UsageError(f"--out {options.out} is the file of prompts itself; name another one")


def _check_found(found: Survey, options: argparse.Namespace, chosen: Chosen) -> None:
    """Before anything is loaded: what no request of its kind can have here is a mistake, not a request that failed.

    That is ids that the model does not have, and conversations of a form that its chat format does not know.
    """
    from coordinator.prompts import prompt_ids
    from glm.errors import ChatFormatError

    config = chosen.config
    for prompt, line in found.forms.items():
        try:
            prompt_ids(prompt, lambda: chosen.text.tokenizer)
        except ChatFormatError as error:
            raise UsageError(f"{options.prompts}, line {line}: {error}") from None
    if found.largest_id is not None and found.largest_id[1] >= config.vocab_size:
        line, token_id = found.largest_id
        raise UsageError(
            f"{options.prompts}, line {line}: token id {token_id} is outside the vocabulary, the model's ids are 0 to "
            f"{config.vocab_size - 1}"
        )


def batch_backend(options: argparse.Namespace, backend: ChatBackend) -> tuple[BatchBackend, int]:
    """What answers, and how many sequences it works on at once."""
    if options.connect is not None:
        return cast("RemoteBackend", backend), REMOTE_SEQUENCES
    from coordinator.batch import LocalBackend

    chat_model = cast("ChatModel", backend)
    return LocalBackend(chat_model), chat_model.engine.settings.max_num_seqs


def _panel(options: argparse.Namespace, backend: ChatBackend) -> AbstractContextManager[WatchView | None]:
    """What `--watch` asks for, which never comes with `--connect`."""
    return watched(options, cast("ChatModel", backend)) if options.watch else nullcontext()


@contextmanager
def _shown(options: argparse.Namespace, found: Survey, panel: WatchView | None) -> Iterator[WorkView]:
    """Progress while the block runs, under the panel if there is one; however it ends, how far it came."""
    from coordinator.batch_view import WorkView

    done_before = found.num_answers - found.num_missing
    log = log_of(options)
    view = WorkView(
        sys.stderr,
        "answers",
        found.num_answers,
        done_before,
        panel=panel,
        has_bar=not _shows_answers(options),
        is_silent=log.is_quiet,
    )
    try:
        with view:
            yield view
    finally:
        log.say(_outcome(options, found, view), level="warning" if view.totals.num_failed else "info")


def _shows_answers(options: argparse.Namespace) -> bool:
    """Whether a bar would be drawn into the answers."""
    return str(options.out) == STANDARD and is_terminal(sys.stdout)


def _outcome(options: argparse.Namespace, found: Survey, view: WorkView) -> str:
    totals = view.totals
    num_there = found.num_answers - found.num_missing + totals.num_done - totals.num_failed
    is_file = str(options.out) != STANDARD
    text = f"{num_there} of {_answers(found.num_answers)}" + (f" in {options.out}" if is_file else "")
    text += f", {totals.num_tokens} tokens in this run, {view.tokens_per_s:.1f} tokens/s"
    if totals.num_failed:
        text += f'; {totals.num_failed} failed by themselves (their lines have "error")'
    if num_there < found.num_answers and is_file:
        text += "; the same command does what is missing"
    return text


def _answers(number: int) -> str:
    return f"{number} answer{'' if number == 1 else 's'}"
