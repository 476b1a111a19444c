"""Reads a tokenizer.json with suspicion: its size, its shape, and by which rules it cuts text into words."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm.errors import TokenizerError
from glm.tokenizer import read_tokenizer_file

MOST_CONTAINERS = 1 << 21
"""Objects and arrays: each takes a hundred times its two bytes."""
MOST_ADDED_TOKENS = 4096

# How GLM-4 cuts a text into words before merging bytes: a fact of its vocabulary, as the vocabulary itself.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_HARMLESS = {"NFC", "NFD", "NFKC", "NFKD", "ByteLevel", "Digits"}
_MOST_STEPS = 4


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """The file's text. `own_rules` is the same where its rules may take for ever, and `text` is then without them."""

    text: str
    own_rules: str | None


def read_tokenizer_json(path: Path, vocab_size: int) -> TokenizerJson:
    """The file, if it is of a size and shape that a tokenizer for a vocabulary of this size can have.

    Raises:
        TokenizerError: it is not, or cannot be read.
    """
    try:
        data = read_tokenizer_file(path)
        num_containers = data.count(b"{") + data.count(b"[")
        if num_containers > MOST_CONTAINERS:
            raise TokenizerError(f"{path} has {num_containers} objects and arrays, far more than such a file has")
        text = data.decode("utf-8-sig")
        keys = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is no complete tokenizer.json ({error}): download it again") from error
    _check_sizes(path, keys, vocab_size)
    if _is_ordinary(keys):
        return TokenizerJson(text, None)
    return TokenizerJson(json.dumps({**keys, "normalizer": None, "pre_tokenizer": None}), text)


def _check_sizes(path: Path, keys: Any, vocab_size: int) -> None:
    model = keys.get("model") if isinstance(keys, dict) else None
    if not isinstance(model, dict):
        raise TokenizerError(f"{path} is no complete tokenizer.json (it has no model): download it again")
    counts = (
        ("pieces", model.get("vocab"), vocab_size),
        ("added tokens", keys.get("added_tokens"), min(MOST_ADDED_TOKENS, vocab_size)),
    )
    for what, found, most in counts:
        if isinstance(found, dict | list) and len(found) > most:
            raise TokenizerError(
                f"{path} has {len(found)} {what}, at most {most} fit a model with a vocabulary of {vocab_size}: "
                "the file belongs to another model"
            )


def _is_ordinary(keys: dict[str, Any]) -> bool:
    """Whether text is cut by rules known to take no longer than the text is long."""
    steps = [*_steps(keys.get("normalizer"), "normalizers"), *_steps(keys.get("pre_tokenizer"), "pretokenizers")]
    return len(steps) <= _MOST_STEPS and all(map(_is_harmless, steps))


def _steps(part: Any, name: str) -> list[Any]:
    if part is None:
        return []
    within = part.get(name) if isinstance(part, dict) and part.get("type") == "Sequence" else None
    return within if isinstance(within, list) else [part]


def _is_harmless(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    if step.get("type") == "Split":
        return step.get("pattern") == {"Regex": SPLIT_PATTERN}
    return step.get("type") in _HARMLESS
