"""`glmpipe chat`: a conversation in the terminal."""

import argparse

from coordinator.commands.options import (
    add_connect_option,
    add_model_options,
    add_placement_options,
    add_sampling_options,
    add_watching_options,
)
from coordinator.commands.session import check_sampling, chosen_sampling, opened

HELP = "chat with a model"
EXAMPLES = """\
examples:
  glmpipe chat                                                 # the demo model, all on the CPU
  glmpipe chat --layers cpu=1-3 --layers cpu=4-6               # the same over two stages
  glmpipe chat --model THUDM/chatglm-6b --layers cuda:0=1-20 --layers cpu=21-28 --gpu-precision int8
  glmpipe chat --connect                                       # a running `glmpipe launch`

Inside the chat, /help lists what else there is.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--stats", action="store_true", help="report after each answer what it cost")
    add_connect_option(parser)
    add_model_options(parser)
    add_placement_options(parser)
    add_sampling_options(parser)
    add_watching_options(parser)


def run(options: argparse.Namespace) -> int:
    """Open the backend and hand over to the REPL."""
    check_sampling(options)
    with opened(options, "chat") as backend:
        from coordinator.chat import run_chat

        return run_chat(backend, chosen_sampling(options, backend.describe().defaults), show_stats=options.stats)
