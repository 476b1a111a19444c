"""`glmpipe generate`: one prompt and its answer, or several; with `--prompts`, any number of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from coordinator.commands import generate_file
from coordinator.commands.options import (
    add_connect_option,
    add_model_options,
    add_placement_options,
    add_sampling_options,
    add_watching_options,
    sampling_overrides,
)
from coordinator.commands.prompts import add_prompt_options, check_prompt, read_prompt
from coordinator.commands.session import check_sampling, chosen_sampling, opened, say
from coordinator.errors import GenerationError, UsageError
from coordinator.terminal import AnswerWriter, columns, quiet_terminal
from glm.printable import printable_json
from protocol.records import as_builtins

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.chat_model import ChatModel
    from coordinator.conversation import ChatBackend, Prompt
    from glm.logprobs import TokenLogprob
    from protocol.client import Finished, SamplingParams

    Logprobs = tuple[TokenLogprob, ...]

HELP = "answer one prompt, or a file of them, and leave"
EXAMPLES = f"""\
examples:
  glmpipe generate --prompt "What is glmpipe?"
  glmpipe generate --model THUDM/chatglm2-6b --layers cuda:0=1-28 --gpu-precision int8 --prompt-file question.txt
  glmpipe generate --ids 5,64286 --greedy --max-new-tokens 16 --json
  glmpipe generate --prompt "Name a city." --n 4 --temperature 1 --logprobs 3
  glmpipe generate --connect --prompt "你好" --stats
  echo "Translate: 你好" | glmpipe generate -q
  glmpipe generate --raw --special-tokens --prompt "<|code_prefix|>def f(<|code_suffix|>    return x<|code_middle|>"
  glmpipe generate --prompts questions.jsonl --out answers.jsonl --max-new-tokens 200

{generate_file.HELP}"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_prompt_options(parser, many=True)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="print ids, text, finish_reason and stats as one JSON object; --n: a list"
    )
    group.add_argument("--stats", action="store_true", help="report on stderr what the answer cost")
    group.add_argument("--n", metavar="N", type=int, default=1, help="answers to each prompt, seeds counting up")
    group.add_argument(
        "--logprobs",
        metavar="K",
        type=int,
        help="the log-probability of each token, as the model itself had it, and the K likeliest ones beside it",
    )
    group.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="where the answers to --prompts go, line by line; goes on where it ended; - for standard output",
    )
    add_connect_option(parser)
    add_model_options(parser)
    add_placement_options(parser)
    add_sampling_options(parser)
    add_watching_options(parser, can_watch=" with --prompts")


def run(options: argparse.Namespace) -> int:
    """Stream the answer's text to stdout; several answers, or JSON, when they are complete."""
    _check(options)
    check_sampling(options)
    if options.prompts is not None:
        return generate_file.run_file(options)
    from coordinator.conversation import system_turns, wanted_of

    prompt = read_prompt(options)
    system, wanted = system_turns(prompt), wanted_of(prompt)
    with opened(options, wanted, lambda chosen: check_prompt(prompt, chosen), system=system) as backend:
        sampling = chosen_sampling(options, backend.describe().defaults)
        if options.n == 1 and options.logprobs is None:
            _conclude(_streamed(backend, prompt, sampling, options), options)
        else:
            _answer_several(backend, prompt, sampling, options)
    return 0


def _check(options: argparse.Namespace) -> None:
    from coordinator.batch_prompts import MOST_ANSWERS
    from glm.logprobs import MOST_TOP

    if options.watch and options.prompts is None:
        raise UsageError(
            "--watch is for many answers, with --prompts; one answer is on the terminal itself, so drop it"
        )
    if options.out is not None and options.prompts is None:
        raise UsageError("--out is where the answers to --prompts go; a single answer goes to stdout, so drop it")
    if not 1 <= options.n <= MOST_ANSWERS:
        raise UsageError(f"--n {options.n} must be from 1 to {MOST_ANSWERS}")
    if options.n > 1 and sampling_overrides(options).get("greedy"):
        raise UsageError(f"--greedy always takes the most likely token: --n {options.n} answers would be the same one")
    if options.logprobs is not None and not 0 <= options.logprobs <= MOST_TOP:
        raise UsageError(f"--logprobs {options.logprobs} must be from 0 (the chosen tokens alone) to {MOST_TOP}")


def _streamed(backend: ChatBackend, prompt: Prompt, sampling: SamplingParams, options: argparse.Namespace) -> Finished:
    from protocol.client import Finished

    finished: Finished | None = None
    shown = AnswerWriter(sys.stdout)
    with quiet_terminal():
        for event in backend.stream(prompt, sampling):
            if isinstance(event, Finished):
                finished = event
            elif not options.json:
                shown.write(event.text)
    assert finished is not None
    if finished.text and not options.json:
        shown.end()
    return finished


def _conclude(finished: Finished, options: argparse.Namespace) -> None:
    if options.json:
        _print_json(_as_json(finished))
    elif not finished.text:
        print(",".join(map(str, finished.token_ids)), flush=True)
    _report(finished, options)


def _answer_several(
    backend: ChatBackend, prompt: Prompt, sampling: SamplingParams, options: argparse.Namespace
) -> None:
    """Raises GenerationError with the first fault, after what went well was printed."""
    from coordinator.batch import Request, answers_to

    batch, _ = generate_file.batch_backend(options, backend)
    answers = answers_to(batch, Request(prompt, sampling, options.n, options.logprobs))
    ended = [(each.finished, each.logprobs) for each in answers if each.finished is not None]
    if options.json and ended:
        objects = [_as_json(*each) for each in ended]
        _print_json(objects if options.n > 1 else objects[0])
    elif ended:
        _print_several(ended, _speller(options, backend))
    for finished, _ in ended:
        _report(finished, options)
    failed = [each.error for each in answers if each.error is not None]
    if failed:
        raise GenerationError(failed[0])


def _print_several(ended: list[tuple[Finished, Logprobs | None]], spell: Callable[[int], str]) -> None:
    from coordinator.report import logprob_lines

    for number, (finished, logprobs) in enumerate(ended, start=1):
        if len(ended) > 1:
            print(f"--- answer {number} of {len(ended)} ---")
        shown = AnswerWriter(sys.stdout)
        shown.write(finished.text or ",".join(map(str, finished.token_ids)))
        shown.end()
        print(*logprob_lines(logprobs or (), spell), sep="\n", end="\n" if logprobs else "", flush=True)


def _print_json(value: Any) -> None:
    print(printable_json(json.dumps(value, ensure_ascii=False)), flush=True)


def _speller(options: argparse.Namespace, backend: ChatBackend) -> Callable[[int], str]:
    """What a token id stands for; a launch that this only connects to keeps its tokenizer to itself."""
    if options.connect is not None:
        return lambda _: ""
    from glm.errors import TokenizerError

    try:
        tokenizer = cast("ChatModel", backend).tokenizer
    except TokenizerError:
        return lambda _: ""
    return lambda token_id: repr(tokenizer.piece(token_id).data.decode("utf-8", "replace"))


def _as_json(finished: Finished, logprobs: Logprobs | None = None) -> dict[str, Any]:
    from coordinator.batch_results import logprobs_as_json

    return {
        "ids": list(finished.token_ids),
        "text": finished.text,
        "finish_reason": finished.finish_reason,
        **({} if logprobs is None else {"logprobs": logprobs_as_json(logprobs)}),
        "stats": as_builtins(finished.stats),
    }


def _report(finished: Finished, options: argparse.Namespace) -> None:
    from coordinator.report import cut_note, report_lines, warnings

    if note := cut_note(finished, options.max_new_tokens):
        say(f"note: {note}")
    say(*(report_lines(finished.stats, columns(sys.stderr)) if options.stats else warnings(finished.stats)))
