"""`glmpipe launch`: bring the stages up and serve chats and one-shot prompts until told to stop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from coordinator.commands.options import add_model_options, add_placement_options, add_watching_options
from coordinator.commands.session import check_watch, launched, say, watched
from coordinator.errors import PlanError

if TYPE_CHECKING:
    from coordinator.watch_view import WatchView

HELP = "start the stages of a plan, stay in front and serve `--connect` programs"
EXAMPLES = """\
examples:
  glmpipe launch plan.toml --watch
  glmpipe launch --model THUDM/chatglm-6b --layers cuda:1=1-12 --layers cuda:0=13-24 --layers cpu=25-28 \\
                 --gpu-precision int8 --cpu-precision fp32 --embeddings cpu --final-layernorm cpu
  glmpipe chat --connect                                       # in another terminal

a plan file:
  model = "THUDM/chatglm-6b"
  max_num_seqs = 16          # optional, as max_model_len and prefill_chunk are

  [[stage]]
  device = "cuda:0"
  layers = "1-24"
  precision = "int8"

  [[stage]]
  device = "cpu"
  layers = "25-28"
  threads = 8                # optional, as kv_budget_tokens = 8192 or kv_budget = "2GiB" is

  [ends]
  embeddings = "cpu"
  lm_head = "cpu"
  precision = "bf16"
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("plan_file", metavar="PLAN", nargs="?", help="a plan file (TOML); or use the options below")
    add_model_options(parser)
    add_placement_options(parser)
    add_watching_options(parser, can_watch="")


def run(options: argparse.Namespace) -> int:
    """Serve until Ctrl-C, SIGTERM, or the loss of a stage."""
    if options.plan_file is not None:
        if options.plan is not None:
            raise PlanError([f"{options.plan_file} and --plan {options.plan} are both given; give one plan"])
        options.plan = options.plan_file
    check_watch(options)
    with launched(options, show_logs=True) as chat_model, watched(options, chat_model) as panel:
        from coordinator.runtime_dir import CLIENT_SOCKET
        from coordinator.service import serve

        endpoint = chat_model.cluster.runtime_dir.endpoint(CLIENT_SOCKET)
        serve(chat_model, endpoint, _announcing(endpoint, panel))
    return 0


def _announcing(endpoint: str, panel: WatchView | None) -> Callable[[], bool]:
    """A `should_stop` that never says so (signals do); asked for the first time, it announces the service.

    It is asked while nothing is computed, too, and so keeps the panel up to date.
    """
    announced = False

    def should_stop() -> bool:
        nonlocal announced
        if not announced:
            announced = True
            print(f"serving at {endpoint}", flush=True)
            say("try `glmpipe chat --connect` in another terminal; Ctrl-C stops everything")
        if panel is not None:
            panel.look()
        return False

    return should_stop
