"""Which published way of talking a model has: its special ids, its chat format, its end ids."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from glm.config import ModelConfig, directory_name
from glm.errors import TokenizerError
from glm.json_file import read_json_object
from glm.small_file import is_file, read_beginning

Dialect = Literal["chatglm", "chatglm2", "chatglm3", "codegeex2", "glm4", "template"]

DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

_NAME_HINTS: tuple[tuple[str, Dialect], ...] = (
    ("chatglm3", "chatglm3"),
    ("chatglm2", "chatglm2"),
    ("codegeex2", "codegeex2"),
    ("codegeex4", "glm4"),
    ("glm-4", "glm4"),
    ("glm4", "glm4"),
)


def detect_dialect(config: ModelConfig, model_dir: Path, chat_format: str | None = None) -> Dialect:
    """Decide the dialect of a model; what the caller says in `chat_format` wins.

    ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4 share one config layout. For that layout the evidence is, strongest first:

    1. tokenizer.model in tiktoken's text format: GLM-4;
    2. tokenizer_config.json knows `<|user|>` (as an added token or in its chat template): GLM-4 if its vocabulary
       is GLM-4's, else ChatGLM3;
    3. a published name in `_name_or_path` of config.json, `name_or_path` of tokenizer_config.json, or the directory
       (the repository's name for a directory of the hub's cache);
    4. numbers: a vocabulary of 150,000 or more is GLM-4's; `seq_length` 8192 is ChatGLM3's; anything else ChatGLM2.

    Raises:
        TokenizerError: `chat_format` is none of `DIALECTS`, or tokenizer_config.json is unreadable.
    """
    for dialect in DIALECTS:
        if chat_format == dialect:
            return dialect
    if chat_format is not None:
        raise TokenizerError(f"chat format {chat_format!r} is not known; known are {', '.join(DIALECTS)}")
    if config.family == "chatglm":
        return "chatglm"
    if config.family in ("glm", "glm4"):
        return "template"
    return _detect_own_layout(config, model_dir)


def _detect_own_layout(config: ModelConfig, model_dir: Path) -> Dialect:
    settings = read_tokenizer_config(model_dir)
    has_large_vocabulary = config.vocab_size >= 150_000
    if is_tiktoken_file(model_dir / "tokenizer.model"):
        return "glm4"
    if _mentions(settings, "<|user|>"):
        return "glm4" if has_large_vocabulary else "chatglm3"
    for name in (config.name, str(settings.get("name_or_path", "")), directory_name(model_dir)):
        for hint, dialect in _NAME_HINTS:
            if hint in name.lower():
                return dialect
    if has_large_vocabulary:
        return "glm4"
    return "chatglm3" if config.max_context == 8192 else "chatglm2"


def _mentions(settings: Mapping[str, Any], name: str) -> bool:
    try:
        return name in json.dumps(settings, ensure_ascii=False)
    except RecursionError:  # it can be read just so
        return False


def read_tokenizer_config(model_dir: Path) -> Mapping[str, Any]:
    """The keys of tokenizer_config.json; none when there is no such file.

    Raises:
        TokenizerError: the file is there but no JSON object.
    """
    return read_json_object(model_dir / "tokenizer_config.json", TokenizerError)


def is_tiktoken_file(path: Path) -> bool:
    """Whether a file begins as tiktoken's text format does: a base64 piece, a space, its rank, a newline."""
    if not is_file(path, TokenizerError):
        return False
    first = read_beginning(path, TokenizerError, 512).split(b"\n", 1)[0]
    piece, _, rank = first.rstrip(b"\r\n").partition(b" ")
    return bool(piece) and piece.isascii() and rank.isdigit() and not piece.startswith(b"version")
