"""`glmpipe generate`: one prompt, one answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from coordinator.commands.options import (
    add_connect_option,
    add_model_options,
    add_placement_options,
    add_sampling_options,
    refuse_with_connect,
)
from coordinator.commands.prompts import add_prompt_options, check_ids, read_prompt
from coordinator.commands.session import check_sampling, chosen_sampling, launched, say

if TYPE_CHECKING:
    from coordinator.conversation import ChatBackend
    from glm.config import ModelConfig
    from protocol.client import Finished

HELP = "answer one prompt and leave"
EXAMPLES = """\
examples:
  glmpipe generate --prompt "What is glmpipe?"
  glmpipe generate --model THUDM/chatglm2-6b --layers cuda:0=1-28 --gpu-precision int8 --prompt-file question.txt
  glmpipe generate --ids 5,64286 --greedy --max-new-tokens 16 --json
  glmpipe generate --connect --prompt "你好" --stats
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_prompt_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", action="store_true", help="print ids, text, finish_reason and stats as one JSON object"
    )
    group.add_argument("--stats", action="store_true", help="report on stderr what the answer cost")
    add_connect_option(parser)
    add_model_options(parser)
    add_placement_options(parser)
    add_sampling_options(parser)


def run(options: argparse.Namespace) -> int:
    """Stream the answer's text to stdout, or print it as JSON when it is complete."""
    from protocol.client import Finished

    prompt = read_prompt(options)
    check_sampling(options)
    with opened(options, lambda config: check_ids(prompt, config)) as backend:
        sampling = chosen_sampling(options, backend.describe().defaults)
        finished: Finished | None = None
        for event in backend.stream(prompt, sampling):
            if isinstance(event, Finished):
                finished = event
            elif not options.json:
                print(event.text, end="", flush=True)
    assert finished is not None
    _conclude(finished, options)
    return 0


@contextmanager
def opened(options: argparse.Namespace, check: Callable[[ModelConfig], None] = lambda _: None) -> Iterator[ChatBackend]:
    """The running launch that `--connect` means, or a model launched for this command, if `check` raises nothing."""
    if options.connect is None:
        with launched(options, check=check) as chat_model:
            yield chat_model
        return
    refuse_with_connect(options)
    from coordinator.client import connect

    with connect(options.connect or None) as backend:
        yield backend


def _conclude(finished: Finished, options: argparse.Namespace) -> None:
    from coordinator.report import report_lines, warnings

    if options.json:
        result = {
            "ids": list(finished.token_ids),
            "text": finished.text,
            "finish_reason": finished.finish_reason,
            "stats": asdict(finished.stats),
        }
        print(json.dumps(result, ensure_ascii=False), flush=True)
    else:
        print("" if finished.text else ",".join(map(str, finished.token_ids)), flush=True)
        if finished.finish_reason == "context_full":
            say("note: the model's context is full, the answer ends here")
    say(*(report_lines(finished.stats) if options.stats else warnings(finished.stats)))
