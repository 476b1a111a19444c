"""The prompt of a one-shot command: a question, a file, or token ids."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.commands.options import add_system_option, add_tools_option, chosen_system, chosen_tools, token_ids
from coordinator.conversation import system_turn
from coordinator.errors import GenerationError, UsageError
from coordinator.input_files import MOST_PROMPT_BYTES, decoded, read_input
from coordinator.terminal import is_terminal

if TYPE_CHECKING:
    from coordinator.commands.session import Chosen
    from glm.config import ModelConfig
    from protocol.client import ChatPrompt, TextPrompt, TokenPrompt


def add_prompt_options(parser: argparse.ArgumentParser, *, many: bool = False) -> None:
    """`--prompt`, `--prompt-file` or `--ids`, one of them, and `--raw`; with `many` also `--prompts`."""
    names = ["--prompt", "--prompt-file", "--ids"] + ["--prompts"] * many
    otherwise = "; without any, a question on standard input" if many else ""
    group = parser.add_argument_group("prompt", f"One of {', '.join(names[:-1])} and {names[-1]}{otherwise}.")
    one = group.add_mutually_exclusive_group(required=not many)
    one.add_argument("--prompt", metavar="TEXT", help="a question, put into the model's chat format")
    one.add_argument("--prompt-file", metavar="FILE", help="the same from a UTF-8 file, or from stdin (-)")
    one.add_argument("--ids", metavar="5,64286", type=token_ids, help="token ids, taken as they are")
    if many:
        one.add_argument(
            "--prompts",
            metavar="FILE",
            type=Path,
            help="many, one JSON object a line (see below), from stdin with -; needs --out",
        )
    add_system_option(group)
    add_tools_option(group)
    group.add_argument("--raw", action="store_true", help="continue the text itself instead of answering it in a chat")
    group.add_argument(
        "--special-tokens",
        action="store_true",
        help="with --raw: names of special tokens in the text are these tokens, such as <|code_prefix|>",
    )


def read_prompt(options: argparse.Namespace) -> ChatPrompt | TextPrompt | TokenPrompt:
    """The prompt that the options mean. Raises UsageError when there is none to read."""
    from protocol.client import ChatPrompt, ChatTurn, TextPrompt, TokenPrompt

    check_kind(options)
    if options.ids is not None:
        if options.raw:
            raise UsageError("--raw is about text; token ids are always taken as they are, so drop it")
        return TokenPrompt(options.ids)
    text = _text(options)
    if options.raw:
        return TextPrompt(text, options.special_tokens)
    if not text.strip():
        raise UsageError("the prompt is empty; ask something, or continue plain text with --raw")
    system = system_turn(chosen_system(options), chosen_tools(options))
    return ChatPrompt((*system, ChatTurn("user", "", text)))


def check_kind(options: argparse.Namespace) -> None:
    """Raises UsageError for options about another kind of prompt than the one that is given."""
    if options.special_tokens and not options.raw:
        raise UsageError("--special-tokens is about text that is continued as it is; add --raw, or drop it")
    for name in ("system", "tools"):
        if getattr(options, name) is not None and (options.raw or options.ids is not None):
            raise UsageError(f"--{name} is a part of a chat; with --raw and --ids, drop it")


def _text(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        text: str = options.prompt
        return text
    if options.prompt_file is None and (sys.stdin is None or is_terminal(sys.stdin)):
        raise UsageError(
            "nothing was asked for; give one of --prompt, --prompt-file, --ids and --prompts, "
            "or a question on standard input"
        )
    return _read(options.prompt_file or "-")


def check_prompt(prompt: ChatPrompt | TextPrompt | TokenPrompt, chosen: Chosen) -> None:
    """Before anything is loaded: all that the request itself would fail by. Raises UsageError or GlmError."""
    from coordinator import prompts
    from glm.positions import prompt_layout
    from protocol.client import TokenPrompt

    if isinstance(prompt, TokenPrompt):
        _check_ids(prompt, chosen.config)
    token_ids = prompts.prompt_ids(prompt, lambda: chosen.text.tokenizer)
    try:
        prompts.check_prompt(token_ids, chosen.config, chosen.settings)
    except GenerationError as error:
        raise UsageError(str(error)) from None
    prompt_layout(token_ids, chosen.config)


def _check_ids(prompt: TokenPrompt, config: ModelConfig) -> None:
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
        return decoded(read_input(name, "--prompt-file", MOST_PROMPT_BYTES)).removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt-file {name} is not UTF-8 text (byte {error.start}); convert it") from None
