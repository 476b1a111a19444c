"""The tokenizers of GLM-4 and later: byte-level BPE, in tiktoken's text format or as a tokenizer.json."""

import base64
import binascii
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from glm.config import ModelConfig
from glm.confined import Confined
from glm.decoding import DecodingRules, Piece
from glm.dialect import Dialect
from glm.errors import TokenizerError
from glm.json_file import read_json_object
from glm.small_file import is_file, read_whole
from glm.tokenizer import Tokenizer, Vocabulary, read_tokenizer_file
from glm.tokenizer_json import SPLIT_PATTERN, read_tokenizer_json

MOST_TEMPLATE_BYTES = 1 << 20
"""The longest published chat template has a fiftieth of that."""

# In this order after the ranks, where tokenizer_config.json does not place them.
GLM4_SPECIAL = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)

LONGEST_BLANK = 100_000
"""Characters of white space, line ends aside, that tiktoken's engine may walk back over; it gives up at 500,000."""
# What Unicode calls white space, without line ends: Python's own `\s` has four more.
BLANK = r"[\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
BLANK_RUN = f"(?<!{BLANK}){BLANK}{{%d,}}+"
"""Looked for only where a run begins: from each of its characters on, a text of shorter runs would take minutes."""
LONG_TEXT = 4096
"""From so many characters on other threads go on while a text is cut; handing over costs more than a short text."""


def load_tiktoken(path: Path, dialect: Dialect, config: ModelConfig, settings: Mapping[str, Any]) -> Tokenizer:
    """GLM-4's `tokenizer.model`: a line for each rank, its bytes in base64, a space, the rank."""
    ranks = _read_ranks(path)
    special = {content: token_id for token_id, content in _added_tokens(settings).items()}
    first = min(config.eos_ids, default=len(ranks))  # <|endoftext|>, the first special token
    special = special or {name: first + index for index, name in enumerate(GLM4_SPECIAL)}
    if min(special.values()) != len(ranks):
        raise TokenizerError(
            f"{path} has {len(ranks)} ranks, but the special tokens begin at id {min(special.values())}: "
            "the file is truncated or belongs to another model; download it again"
        )
    missing = [name for name in ("[gMASK]", "<sop>") if name not in special]
    if missing:
        raise TokenizerError(f"tokenizer_config.json beside {path} has no {' and no '.join(missing)}")
    return TiktokenTokenizer(ranks, special, dialect)


class TiktokenTokenizer(Tokenizer):
    """GLM-4-9B-chat in its own layout."""

    def __init__(self, ranks: Mapping[bytes, int], special: Mapping[str, int], dialect: Dialect) -> None:
        super().__init__(
            Vocabulary(
                dialect=dialect,
                size=max(special.values()) + 1,
                special=special,
                typed_special=special,
                prefix_ids=(special["[gMASK]"], special["<sop>"]),
                rules=DecodingRules(special_separator=" "),
            )
        )
        self._bytes = list(ranks)
        self._special_bytes = {token_id: name.encode() for name, token_id in special.items()}
        self._ranks = dict(ranks)
        self._encoding = self._encoding_of(SPLIT_PATTERN)
        self._long_blank = re.compile(BLANK_RUN % LONGEST_BLANK)

    def _encoding_of(self, pattern: str) -> tiktoken.Encoding:
        special = dict(self.vocabulary.special)
        return tiktoken.Encoding("glm4", pat_str=pattern, mergeable_ranks=self._ranks, special_tokens=special)

    @cached_property
    def _whole(self) -> tiktoken.Encoding:
        """Takes a text as one word."""
        return self._encoding_of("(?s:.+)")

    def _encode_text(self, text: str) -> list[int]:
        """Long white space apart: by SPLIT_PATTERN it is a word of its own, without its last character where text
        follows, or belongs to the line end behind it. Nothing before such a word changes where it is cut off.
        """
        ids: list[int] = []
        start = 0
        for run in self._long_blank.finditer(text):
            behind = text[run.end() : run.end() + 1]
            if behind in ("\r", "\n"):
                continue
            end = run.end() - 1 if behind else run.end()
            ids += self._encoding.encode_ordinary(text[start : run.start()])
            ids += self._whole.encode_ordinary(text[run.start() : end])
            start = end
        return ids + self._encoding.encode_ordinary(text[start:])

    def piece(self, token_id: int) -> Piece:
        if 0 <= token_id < len(self._bytes):
            return Piece(self._bytes[token_id])
        return Piece(self._special_bytes.get(token_id, b""), is_special=True)


def load_tokenizer_json(path: Path, dialect: Dialect, config: ModelConfig, settings: Mapping[str, Any]) -> Tokenizer:
    """A `tokenizer.json` of a model in one of transformers' layouts."""
    found = read_tokenizer_json(path, config.vocab_size)
    template = read_chat_template(path.parent, settings)
    roles = read_json_object(path.parent / "special_tokens_map.json", TokenizerError)
    # As in transformers: the file of tokens goes before, unless the other has the tokens themselves.
    first, second = (roles, settings) if "added_tokens_decoder" in settings else (settings, roles)
    variables = {**_template_variables(first), **_template_variables(second)}
    try:
        backend = tokenizers.Tokenizer.from_str(found.text)
        decoder = type(backend.decoder).__name__
        if decoder != "ByteLevel":
            raise TokenizerError(
                f"{path} decodes with {decoder}; GLM models decode with ByteLevel, others are not supported"
            )
        own_rules = None if found.own_rules is None else OwnRules(path, found.own_rules)
        return JsonTokenizer(backend, dialect, template, variables, own_rules)
    except (TokenizerError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and when it panics something wider
        raise TokenizerError(f"{path} is no complete tokenizer.json ({error}): download it again") from error


class OwnRules:
    """Rules for cutting text that nobody here knows: they may be hostile, so they run in a process apart."""

    def __init__(self, path: Path, source: str) -> None:
        """Raises TokenizerError: they are no rules, or take too much to begin with."""
        self._path = path
        self._confined = Confined("words", source)
        self._checked(self._confined.begun)

    def encode(self, text: str) -> list[int]:
        """Token ids. Raises TokenizerError: this text took more time or memory than any should."""
        ids: list[int] = self._checked(self._confined.ask(text))["ids"]
        return ids

    def _checked(self, answer: dict[str, Any] | None) -> dict[str, Any]:
        if answer is None:
            raise TokenizerError(
                f"{self._path}: its rules for cutting text into words took more time or memory than any should, and "
                "were stopped: get the file from the model's publisher"
            )
        if "error" in answer:
            raise TokenizerError(f"{self._path} cannot cut this text into words ({answer['error']})")
        return answer


class JsonTokenizer(Tokenizer):
    """Byte-level BPE described by a tokenizer.json."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        dialect: Dialect,
        chat_template: str | None,
        variables: Mapping[str, str],
        own_rules: OwnRules | None = None,
    ) -> None:
        """With `own_rules` those encode, and `backend` has everything else."""
        self._own_rules = own_rules
        backend.no_padding()
        backend.no_truncation()
        # Special tokens are recognised by this project alone, and only where it wants them.
        backend.encode_special_tokens = True
        self._backend = backend
        self._added = {
            token_id: Piece(token.content.encode(), is_special=token.special)
            for token_id, token in backend.get_added_tokens_decoder().items()
        }
        special = {piece.data.decode(): token_id for token_id, piece in self._added.items() if piece.is_special}
        prefix_ids, suffix_ids = _what_stands_around(backend)
        super().__init__(
            Vocabulary(
                dialect=dialect,
                size=1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1),
                special=special,
                typed_special=special,
                prefix_ids=prefix_ids,
                suffix_ids=suffix_ids,
                chat_template=chat_template,
                template_variables=variables,
            )
        )

    def _encode_text(self, text: str) -> list[int]:
        if self._own_rules is not None:
            return self._own_rules.encode(text)
        if len(text) < LONG_TEXT:
            return self._backend.encode(text, add_special_tokens=False).ids
        return self._backend.encode_batch([text], add_special_tokens=False)[0].ids  # this call lets other threads run

    def piece(self, token_id: int) -> Piece:
        added = self._added.get(token_id)
        if added is not None:
            return added
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return Piece(b"", is_special=True)
        try:
            return Piece(bytes(BYTE_OF_CHARACTER[character] for character in token))
        except KeyError:
            return Piece(token.encode())


def read_chat_template(model_dir: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a model: chat_template.jinja, else the one in tokenizer_config.json, else None."""
    path = model_dir / "chat_template.jinja"
    if is_file(path, TokenizerError):
        return _template_text(path)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _template_text(path: Path) -> str:
    try:
        return read_whole(path, TokenizerError, MOST_TEMPLATE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text (byte {error.start}): download it again") from error


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves, the others as characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_tokenizer_file(path).splitlines()):
        piece, _, rank = line.partition(b" ")
        try:
            is_next = int(rank) == number
            ranks[base64.b64decode(piece, validate=True)] = number
        except (ValueError, binascii.Error):
            is_next = False
        if not is_next:
            raise TokenizerError(
                f"{path}, line {number + 1}: {line[:40]!r} is not a base64 piece and the rank {number}: "
                "the file is damaged or truncated; download it again"
            )
    if len(ranks) < number + 1:
        raise TokenizerError(f"{path} has the same piece twice: download it again")
    return ranks


def _added_tokens(settings: Mapping[str, Any]) -> dict[int, str]:
    added = settings.get("added_tokens_decoder", {})
    try:
        return {int(token_id): str(token["content"]) for token_id, token in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"tokenizer_config.json: added_tokens_decoder is malformed ({error!r})") from error


def _what_stands_around(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer's own post-processing puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def _template_variables(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, as `bos_token`; published files hold strings or objects with a `content`."""
    variables = {}
    for key, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            variables[key] = content
    return variables
