"""`glmpipe launch`: bring the stages up and serve chats and one-shot prompts until told to stop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.commands.options import (
    add_model_options,
    add_placement_options,
    add_watching_options,
    may_be_a_model,
)
from coordinator.commands.session import check_watch, launched, log_of, watched
from coordinator.errors import PlanError, UsageError
from coordinator.log import JsonLog, Log
from glm.standard_streams import OutputError, forget_stdout

if TYPE_CHECKING:
    from coordinator.cluster import Cluster
    from coordinator.watch_view import WatchView

HELP = "start the stages of a plan, stay in front and serve `--connect` programs"
EXAMPLES = """\
examples:
  glmpipe launch plan.toml --watch
  glmpipe launch THUDM/chatglm2-6b --layers cuda:0=all --gpu-precision int8
  glmpipe launch --model THUDM/chatglm-6b --layers cuda:1=1-12 --layers cuda:0=13-24 --layers cpu=25-28 \\
                 --gpu-precision int8 --cpu-precision fp32 --embeddings cpu --final-layernorm cpu
  glmpipe chat --connect                                       # in another terminal
  glmpipe launch plan.toml --listen tcp://192.168.1.2          # with stages on other hosts: prints what to run there
  glmpipe launch --layers cuda:0=1-12 --layers lab2/cuda:0=13-28 --listen tcp://192.168.1.2      # the same by options

a plan file:
  model = "THUDM/chatglm-6b"
  max_num_seqs = 16          # optional, as max_model_len and prefill_chunk are

  [[stage]]
  device = "cuda:0"
  layers = "1-12"
  precision = "int8"

  [[stage]]
  device = "cpu"
  layers = "13-16"
  threads = 8                # optional, as kv_budget_tokens = 8192 or kv_budget = "2GiB" is

  [[stage]]
  host = "lab2"              # another host; `glmpipe keys --help` says how it is let in
  device = "cuda:0"
  layers = "17-28"

  [ends]
  embeddings = "cpu"
  lm_head = "cpu"
  precision = "bf16"
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "plan_file", metavar="PLAN|MODEL", nargs="?", help="a plan file (TOML), or a model as behind --model"
    )
    add_model_options(parser, positional=False)
    add_placement_options(parser)
    add_watching_options(parser, can_watch="")
    group = parser.add_argument_group("logs", "All go to stderr. docs/operations.md says what is in them.")
    group.add_argument("--log-json", action="store_true", help="one JSON object a line, those of the workers included")
    group.add_argument(
        "--log-prompts",
        action="store_true",
        help="log the text of prompts and answers; without this, no text of theirs is in the logs",
    )


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    _take_word(options)
    check_watch(options)
    log = log_of(options)
    if isinstance(log, JsonLog):
        if options.watch:
            raise UsageError("--watch draws on stderr, where --log-json writes objects; drop one of them")
        log.take_over_logging()
    from coordinator.reception import Reception
    from coordinator.request_log import RequestLog
    from coordinator.runtime_dir import CLIENT_SOCKET, RuntimeDir

    with Reception() as reception, RuntimeDir() as place:
        endpoint = place.endpoint(CLIENT_SOCKET)
        reception.open(endpoint, lambda: "its model and plan to be checked")

        def started(cluster: Cluster) -> None:
            reception.waits_for = cluster.waits_for

        opened = launched(options, show_logs=True, on_started=started, runtime_dir=place)
        with opened as chat_model, watched(options, chat_model) as panel:
            from coordinator.service import serve_at

            requests = RequestLog(log, with_text=options.log_prompts)
            serve_at(chat_model, reception, _announcing(endpoint, log, panel), requests)
    return 0


def _take_word(options: argparse.Namespace) -> None:
    """PLAN|MODEL is what `--plan` or `--model` would be. Raises PlanError, UsageError where both are given."""
    word = options.plan_file
    if word is None:
        return
    if may_be_a_model(word) and not Path(word).is_file():
        if options.model not in (None, word):
            raise UsageError(f"two models are named, {word} and {options.model}; name one")
        options.model = word
        return
    if not word.endswith(".toml") and not Path(word).exists():
        raise UsageError(
            f"{word} is neither a plan file nor a model (a directory, or a hub id such as THUDM/chatglm2-6b)"
        )
    if options.plan is not None:
        raise PlanError([f"{word} and --plan {options.plan} are both given; give one plan"])
    options.plan = word


def _announcing(endpoint: str, log: Log, panel: WatchView | None) -> Callable[[], bool]:
    """A `should_stop` that never says so (signals do); asked for the first time, it announces the service.

    It is asked while nothing is computed, too, and so keeps the panel up to date.
    """
    announced = False

    def should_stop() -> bool:
        nonlocal announced
        if not announced:
            announced = True
            try:
                print(f"serving at {endpoint}", flush=True)
            except OutputError as error:  # nobody else has to suffer from that
                log.say(f"note: {error} (serving at {endpoint})", level="warning")
                forget_stdout()
            log.say("try `glmpipe chat --connect` in another terminal; Ctrl-C stops everything", event="serving")
        if panel is not None:
            panel.look()
        return False

    return should_stop
