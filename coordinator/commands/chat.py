"""`glmpipe chat`: a conversation in the terminal."""

import argparse

from coordinator.commands.options import (
    add_connect_option,
    add_model_options,
    add_placement_options,
    add_sampling_options,
    add_system_option,
    add_tools_option,
    add_watching_options,
    chosen_system,
    chosen_tools,
)
from coordinator.commands.session import check_sampling, chosen_sampling, opened
from coordinator.context_window import OVERFLOWS

HELP = "chat with a model"
EXAMPLES = """\
examples:
  glmpipe chat                                                 # the demo model, all on the CPU
  glmpipe chat --layers cpu=1-3 --layers cpu=4-6               # the same over two stages
  glmpipe chat --model THUDM/chatglm-6b --layers cuda:0=1-20 --layers cpu=21-28 --gpu-precision int8
  glmpipe chat --model THUDM/chatglm3-6b --system @librarian.txt
  glmpipe chat --connect                                       # a running `glmpipe launch`

Inside the chat, /help lists what else there is.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--stats", action="store_true", help="report after each answer what it cost")
    add_system_option(parser)
    add_tools_option(parser)
    parser.add_argument(
        "--context-overflow",
        choices=OVERFLOWS,
        default=OVERFLOWS[0],
        help="when the conversation fills the context: leave the oldest questions out and go on (slide, the default), "
        "or say so and wait for `clear` (stop)",
    )
    add_connect_option(parser)
    add_model_options(parser)
    add_placement_options(parser)
    add_sampling_options(parser)
    add_watching_options(parser)


def run(options: argparse.Namespace) -> int:
    """Open the backend and hand over to the REPL."""
    check_sampling(options)
    from coordinator.conversation import Conversation, system_turn

    begun = Conversation(chosen_system(options), chosen_tools(options))
    with opened(options, "chat", system=system_turn(begun.system, begun.tools)) as backend:
        from coordinator.chat import run_chat

        sampling = chosen_sampling(options, backend.describe().defaults)
        overflow = options.context_overflow
        return run_chat(backend, sampling, show_stats=options.stats, conversation=begun, overflow=overflow)
