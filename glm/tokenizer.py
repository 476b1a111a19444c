"""Text to token ids and back: what every tokenizer can do, and how a model's own one is found and loaded."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm.config import ModelConfig
from glm.decoding import DecodingRules, Piece, decode
from glm.dialect import Dialect, detect_dialect
from glm.errors import NoTokenizerError, TokenizerError, faults_as
from glm.lineage import is_tiktoken_file, read_tokenizer_config
from glm.small_file import is_file, read_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from glm.chat_format import ChatFormat


MOST_TOKENIZER_BYTES = 64 << 20
"""The largest published one, GLM-4's tokenizer.json, has 20 MB, and twice that with each merge on lines of its own."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The facts about a tokenizer beside its pieces."""

    dialect: Dialect
    size: int
    """All ids below this one are known to the tokenizer; a model's own vocabulary may be padded beyond it."""
    special: Mapping[str, int]
    """Special tokens by name, as `<|user|>`."""
    typed_special: Mapping[str, int] = field(default_factory=dict)
    """Those that the published tokenizer recognises inside a text, when it is allowed to."""
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    rules: DecodingRules = field(default_factory=DecodingRules)
    chat_template: str | None = None
    template_variables: Mapping[str, str] = field(default_factory=dict)
    """What a chat template may name: `bos_token` and its like."""


class Tokenizer(ABC):
    """Text to token ids and back.

    What somebody typed never gives special ids, whatever it looks like, unless the caller asks for that with
    `allow_special`. Ids that the tokenizer does not know (a padded vocabulary has such) decode to nothing.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.chat_format: ChatFormat | None = None
        """Kept here by `glm.chat_format.chat_format_for`, once it was asked for."""

    @property
    def dialect(self) -> Dialect:
        return self.vocabulary.dialect

    @property
    def special(self) -> Mapping[str, int]:
        """Special tokens by name."""
        return self.vocabulary.special

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows."""
        return self.vocabulary.size

    @property
    def rules(self) -> DecodingRules:
        return self.vocabulary.rules

    @abstractmethod
    def piece(self, token_id: int) -> Piece:
        """What one id stands for; for an unknown one an empty special piece."""

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of text that holds no special tokens and no lone surrogates. May raise anything, see `encode`."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text, without what a prompt has before and after it.

        With `allow_special` the names of special tokens in the text become their ids, as far as the published
        tokenizer does so.

        Raises:
            TokenizerError: the library behind it cannot take this text.
        """
        text = _without_surrogates(text)
        special = self.vocabulary.typed_special if allow_special else {}
        ids: list[int] = []
        with faults_as(TokenizerError, f"the tokenizer cannot take this text of {len(text)} characters"):
            for part, special_id in split_special(text, special):
                ids.extend(self._encode_text(part) if special_id is None else [special_id])
        return ids

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text as the published tokenizer's call gives them, with `[gMASK]` and its like."""
        ids = self.encode(text, allow_special=allow_special)
        return [*self.vocabulary.prefix_ids, *ids, *self.vocabulary.suffix_ids]

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of the ids; special tokens are left out, or shown as the published tokenizer shows them."""
        return decode(self, token_ids, skip_special=skip_special)


def split_special(text: str, special: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Cut a text at the names of special tokens: yields (text, None) and (name, id), leaving out empty texts."""
    names = sorted(filter(None, special), key=len, reverse=True)
    if not names:
        yield text, None
        return
    for part in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if part:
            yield part, special.get(part)


def _without_surrogates(text: str) -> str:
    """Terminals and JSON can deliver half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def load_tokenizer(model_dir: Path, config: ModelConfig, chat_format: str | None = None) -> Tokenizer:
    """Load the tokenizer that lies in a model directory.

    `chat_format` overrides what `detect_dialect` would find.

    Raises:
        NoTokenizerError: the directory has no tokenizer files; the model can still be given token ids.
        TokenizerError: they are truncated, Git-LFS pointers, or do not fit the model.
    """
    dialect = detect_dialect(config, model_dir, chat_format)
    path, loader = _find_tokenizer_file(model_dir, dialect)
    tokenizer = loader(path, dialect, config, read_tokenizer_config(model_dir))
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{path} has ids up to {tokenizer.vocab_size - 1}, but the model's vocabulary has {config.vocab_size}: "
            "the file belongs to another model"
        )
    return tokenizer


def read_tokenizer_file(path: Path) -> bytes:
    """All of the file. Raises TokenizerError: it is empty, far too large, a Git-LFS pointer, or cannot be read."""
    found = read_whole(path, TokenizerError, MOST_TOKENIZER_BYTES)
    if not found:
        raise TokenizerError(f"{path} is empty: download it again")
    return found


def _find_tokenizer_file(
    model_dir: Path, dialect: Dialect
) -> "tuple[Path, Callable[[Path, Dialect, ModelConfig, Mapping[str, Any]], Tokenizer]]":
    # Imported here: the libraries behind them take a while, and a model that is given ids needs neither.
    from glm.byte_level_tokenizer import load_tiktoken, load_tokenizer_json
    from glm.sentencepiece_tokenizer import load_chatglm, load_chatglm2

    if dialect == "chatglm":
        candidates = [("ice_text.model", load_chatglm)]
    elif is_tiktoken_file(model_dir / "tokenizer.model"):
        candidates = [("tokenizer.model", load_tiktoken)]
    else:
        candidates = [("tokenizer.model", load_chatglm2), ("tokenizer.json", load_tokenizer_json)]
    if dialect in ("glm4", "template"):
        candidates.reverse()
    for name, loader in candidates:
        if is_file(model_dir / name, TokenizerError):
            return model_dir / name, loader
    names = " or ".join(name for name, _ in candidates)
    raise NoTokenizerError(
        f"{model_dir} has no {names}, so text cannot be turned into token ids: "
        "copy the file from where the model was published, or give token ids (--ids) instead of text"
    )
