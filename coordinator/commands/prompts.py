"""The prompt of a one-shot command: a question, a file, or token ids."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.commands.options import token_ids
from coordinator.errors import UsageError

if TYPE_CHECKING:
    from glm.config import ModelConfig
    from protocol.client import ChatPrompt, TextPrompt, TokenPrompt


def add_prompt_options(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """`--prompt`, `--prompt-file` or `--ids`, one of them, and `--raw`; with `many` also `--prompts`."""
    names = ["--prompt", "--prompt-file", "--ids"] + ["--prompts"] * many
    group = parser.add_argument_group("prompt", f"One of {', '.join(names[:-1])} and {names[-1]}.")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--prompt", metavar="TEXT", help="a question, put into the model's chat format")
    one.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file, or from stdin (-)")
    one.add_argument("--ids", metavar="5,64286", type=token_ids, help="token ids, taken as they are")
    if many:
        one.add_argument(
            "--prompts", metavar="FILE", type=Path, help="many, one JSON object a line (see below); needs --out"
        )
    group.add_argument("--raw", action="store_true", help="continue the text itself instead of answering it in a chat")


def read_prompt(options: argparse.Namespace) -> ChatPrompt | TextPrompt | TokenPrompt:
    """The prompt that the options mean. Raises UsageError when there is none to read."""
    from protocol.client import ChatPrompt, ChatTurn, TextPrompt, TokenPrompt

    if options.ids is not None:
        if options.raw:
            raise UsageError("--raw is about text; token ids are always taken as they are, so drop it")
        return TokenPrompt(options.ids)
    text = options.prompt if options.prompt is not None else _read(options.prompt_file)
    if options.raw:
        return TextPrompt(text)
    if not text.strip():
        raise UsageError("the prompt is empty; ask something, or continue plain text with --raw")
    return ChatPrompt((ChatTurn("user", "", text),))


def check_ids(prompt: ChatPrompt | TextPrompt | TokenPrompt, config: ModelConfig) -> None:
    """Before anything is loaded: raises UsageError for token ids that the model does not have, or too many of them."""
    from protocol.client import TokenPrompt

    if not isinstance(prompt, TokenPrompt):
        return
    wrong = [token_id for token_id in prompt.token_ids if token_id >= config.vocab_size]
    if wrong:
        raise UsageError(
            f"--ids: {wrong[0]} is outside the vocabulary, the model's ids are 0 to {config.vocab_size - 1}"
        )
    if len(prompt.token_ids) >= config.max_context:
        raise UsageError(f"--ids: {len(prompt.token_ids)} tokens leave no room in the model's {config.max_context}")


def _read(name: str) -> str:
    """A file's text without the newline that editors put at its end."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise UsageError(f"--prompt-file {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {name} is not UTF-8 text (byte {error.start}); convert it") from None
