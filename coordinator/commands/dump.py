"""`glmpipe dump`: what the running pipeline computes for a prompt, as a file to compare."""

import argparse
import os
from pathlib import Path

from coordinator.commands.options import add_model_options, add_placement_options
from coordinator.commands.prompts import add_prompt_options, check_ids, read_prompt
from coordinator.commands.session import launched, say
from coordinator.errors import UsageError

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
    _check_writable(options.out)
    with launched(options, record_hidden_states=True, check=lambda config: check_ids(prompt, config)) as chat_model:
        from coordinator.dump import dump

        tensors = dump(chat_model, chat_model.prompt_ids(prompt), options.out)
    say(f"wrote {len(tensors)} tensors to {options.out}")
    return 0


def _check_writable(path: Path) -> None:
    """Found out now rather than after a large model has loaded."""
    if path.is_dir():
        raise UsageError(f"--out {path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"--out {path} is a device or a socket, which a dump would replace; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"--out {path}: the directory {path.parent} does not exist; create it first")
    if not all(os.access(place, os.W_OK) for place in (path, path.parent) if place.exists()):
        raise UsageError(f"--out {path} is not writable; choose another place")
