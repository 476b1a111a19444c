"""`glmpipe dump`: what the running pipeline computes for a prompt, as a file to compare."""

import argparse
from pathlib import Path

from coordinator.commands.options import add_model_options, add_placement_options
from coordinator.commands.prompts import add_prompt_options, check_prompt, read_prompt
from coordinator.commands.session import check_writable, launched, say

HELP = "write every layer's results for a prompt to a safetensors file"
EXAMPLES = """\
examples:
  glmpipe dump --ids 5,64286,12 --out whole.safetensors
  glmpipe dump --ids 5,64286,12 --out split.safetensors --stages 2
  glmpipe compare whole.safetensors split.safetensors

The file holds embedding, layer.{i}.hidden, layer.{i}.key, layer.{i}.value (i from 0), final_layernorm and logits, as
float32 with the token as first dimension.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_prompt_options(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the safetensors file to write")
    add_model_options(parser)
    add_placement_options(parser)


def run(options: argparse.Namespace) -> int:
    """Launch, feed the prompt, write the file."""
    prompt = read_prompt(options)
    check_writable(options.out, "--out")
    from coordinator.conversation import system_turns, wanted_of

    with launched(
        options,
        record_hidden_states=True,
        check=lambda chosen: check_prompt(prompt, chosen),
        wanted=wanted_of(prompt),
        system=system_turns(prompt),
    ) as chat_model:
        from coordinator.dump import dump

        tensors = dump(chat_model, chat_model.prompt_ids(prompt), options.out)
    say(f"wrote {len(tensors)} tensors to {options.out}")
    return 0
