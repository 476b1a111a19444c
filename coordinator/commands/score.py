"""`glmpipe score`: how likely a model finds a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.commands.options import add_model_options, add_placement_options
from coordinator.commands.session import check_writable, launched
from coordinator.errors import UsageError
from coordinator.input_files import MOST_TEXT_BYTES, decoded, read_input

if TYPE_CHECKING:
    from coordinator.chat_model import ChatModel
    from coordinator.commands.session import Chosen
    from coordinator.scheduler import SchedulerSettings
    from coordinator.score import TextScore
    from glm.config import ModelConfig
    from glm.tokenizer import Tokenizer

HELP = "tell how likely a model finds a text: perplexity, bits per byte"
EXAMPLES = """\
examples:
  glmpipe score --text novel.txt
  glmpipe score --text novel.txt --model THUDM/chatglm2-6b --layers cuda:0=1-28 --gpu-precision int4 --json
  glmpipe score --text novel.txt --window 1024 --stride 256 --tokens tokens.jsonl

A text longer than a window is cut into windows that overlap: each advances by --stride, and a token counts once, in the
first window that holds it. So all tokens but the first window's have at least window - stride tokens before them. Every
window begins with what the model wants before a text ([gMASK] and its like). Perplexities of other windows, strides or
tokenizers do not compare; bits per byte of other tokenizers do.

ChatGLM-6B reads a prompt both ways, so there is nothing in it to be foretold: its text is scored as the answer to an
empty prompt.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    group = parser.add_argument_group("what is scored")
    group.add_argument("--text", metavar="FILE", required=True, help="a UTF-8 text, or - for stdin; taken as it is")
    group.add_argument(
        "--window",
        metavar="N",
        type=int,
        help="tokens of the text fed at once (default 2048, or what the context holds)",
    )
    group.add_argument("--stride", metavar="N", type=int, help="how far each window advances (default half a window)")
    group.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    group.add_argument("--tokens", metavar="FILE", type=Path, help="write a JSON object for each token, one a line")
    add_model_options(parser)
    add_placement_options(parser)


def run(options: argparse.Namespace) -> int:
    """Score, print."""
    text = _read(options.text)
    if options.tokens is not None:
        check_writable(options.tokens, "--tokens")
    with launched(options, check=lambda chosen: _check(options, chosen, text), wanted="text") as chat_model:
        window, stride = _sizes(options, chat_model.config, chat_model.tokenizer, chat_model.engine.settings)
        started_at_s = time.monotonic()
        score = _score(chat_model, text, window, stride, options.tokens)
        seconds = time.monotonic() - started_at_s
    if options.json:
        figures = dataclasses.asdict(score) | {"window": window, "stride": stride, "seconds": seconds}
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in figures.items()}))
    else:
        print(*_lines(score, window, stride, seconds), sep="\n")
    return 0


def _check(options: argparse.Namespace, chosen: Chosen, text: str) -> None:
    """Before anything is loaded."""
    config, tokenizer = chosen.config, chosen.text.tokenizer
    if options.window is not None and not 2 <= options.window < config.max_context:
        raise UsageError(f"--window {options.window} must be from 2 to {config.max_context - 1} for this model")
    most = options.window or config.max_context - 1
    if options.stride is not None and not 1 <= options.stride <= most:
        raise UsageError(f"--stride {options.stride} must be from 1 to the window of {most} tokens")
    _sizes(options, config, tokenizer, chosen.settings)
    if len(tokenizer.encode(text)) <= (not tokenizer.encode_prompt("")):
        raise UsageError("the text is too short: nothing in it has anything before it that it could follow from")


def _sizes(
    options: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, settings: SchedulerSettings
) -> tuple[int, int]:
    """Window and stride, which leave room for the model's prefix."""
    from coordinator.prompts import max_model_len
    from coordinator.score import DEFAULT_WINDOW

    num_prefix = len(tokenizer.encode_prompt(""))
    most = max_model_len(config, settings) - 1 - num_prefix
    window = min(DEFAULT_WINDOW - num_prefix, most) if options.window is None else options.window
    stride = (window + 1) // 2 if options.stride is None else options.stride
    if window > most:
        raise UsageError(f"--window {window}: beside the model's prefix the plan's context has room for {most} tokens")
    if not 1 <= stride <= window - (not num_prefix):
        raise UsageError(
            f"--stride {stride} must be less than the window of {window} tokens"
            + ": this model has nothing before a text, so windows must overlap" * (not num_prefix)
        )
    return window, stride


def _score(chat_model: ChatModel, text: str, window: int, stride: int, tokens_path: Path | None) -> TextScore:
    from coordinator.batch_view import WorkView
    from coordinator.score import score_tokens, summarise, token_fields

    tokenizer = chat_model.tokenizer
    token_ids, prefix = tokenizer.encode(text), tokenizer.encode_prompt("")
    logprobs, num_windows = [], 0
    with ExitStack() as stack:
        view = stack.enter_context(WorkView(sys.stderr, "tokens", len(token_ids)))
        file = None if tokens_path is None else stack.enter_context(tokens_path.open("w", encoding="utf-8"))
        for scored in score_tokens(chat_model, prefix, token_ids, window, stride):
            num_windows += 1
            logprobs += [each.logprob for each in scored]
            if file is not None:
                file.writelines(token_fields(each, tokenizer) for each in scored)
            view.totals.num_done = view.totals.num_tokens = len(logprobs)
            view.update()
    return summarise(text, len(token_ids), num_windows, logprobs)


def _lines(score: TextScore, window: int, stride: int, seconds: float) -> tuple[str, ...]:
    left_out = score.tokens - score.scored_tokens
    note = f", {left_out} of them not scored: nothing stands before it" if left_out else ""
    many = "1 window" if score.windows == 1 else f"{score.windows} windows advancing by {stride}"
    return (
        f"tokens           {score.tokens}{note}",
        f"log-probability  {score.logprob:.3f}",
        f"perplexity       {score.perplexity:.4f}",
        f"bits per token   {score.bits_per_token:.4f}",
        f"bits per byte    {score.bits_per_byte:.4f}  ({score.bytes} bytes)",
        f"bits per char    {score.bits_per_character:.4f}  ({score.characters} characters)",
        f"{many}, of up to {window} tokens; {seconds:.1f} s, {score.scored_tokens / seconds:.1f} tokens/s",
    )


def _read(name: str) -> str:
    try:
        text = decoded(read_input(name, "--text", MOST_TEXT_BYTES))
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {name} is not UTF-8 text (byte {error.start}); convert it") from None
    if not text:
        raise UsageError(f"--text {name} is empty; there is nothing to score")
    return text
