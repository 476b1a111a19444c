"""The tokenizers of ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B, which are SentencePiece models."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from glm.config import ModelConfig
from glm.decoding import EACH_BYTE, DecodingRules, Piece
from glm.dialect import Dialect
from glm.errors import TokenizerError
from glm.tokenizer import Tokenizer, Vocabulary, read_tokenizer_file

LONGEST_BLANK = 80
WORD_SPACE = "\u2581"
NO_PIECE = Piece(b"", is_special=True)

# The published ChatGLM-6B tokenizer leaves the generic clean-up of English text on; the later ones turn it off.
ENGLISH_CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)

CHATGLM_TYPED = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
MASK_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")


def load_chatglm(path: Path, dialect: Dialect, config: ModelConfig, settings: Mapping[str, Any]) -> Tokenizer:
    """ChatGLM-6B's `ice_text.model`.

    The first revisions put `num_image_tokens` (20000) ids before those of the file; later ones write 0 into
    tokenizer_config.json. Where neither is said, the place of `<sop>` in config.json tells.
    """
    processor = _load_processor(path)
    if processor.piece_to_id("<sop>") == processor.unk_id():
        raise TokenizerError(f"{path} has no piece <sop>: it is truncated or not ChatGLM-6B's; download it again")
    shift, implied = settings.get("num_image_tokens"), (config.bos_id or 0) - processor.piece_to_id("<sop>")
    if shift is None:
        shift = implied
    complaint = f"tokenizer_config.json beside {path}: num_image_tokens is {shift!r}"
    if not isinstance(shift, int) or shift < 0:
        raise TokenizerError(f"{complaint}, it must be 0 or a positive number")
    if processor.vocab_size() + shift > config.vocab_size >= processor.vocab_size() + implied and implied >= 0:
        raise TokenizerError(
            f"{complaint}, but the model has {config.vocab_size} ids and bos_token_id {config.bos_id}, which fit "
            f"{implied}: write {implied} there, or use the tokenizer_config.json of the same revision as config.json"
        )
    return ChatGlmTokenizer(processor, dialect, shift, settings)


def load_chatglm2(path: Path, dialect: Dialect, config: ModelConfig, settings: Mapping[str, Any]) -> Tokenizer:
    """The `tokenizer.model` of ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B; special ids follow its pieces."""
    del config, settings
    return ChatGlm2Tokenizer(_load_processor(path), dialect)


class ChatGlmTokenizer(Tokenizer):
    """ChatGLM-6B. Newlines, tabs and runs of spaces have ids of their own; full-width punctuation is folded."""

    def __init__(
        self, processor: SentencePieceProcessor, dialect: Dialect, shift: int, settings: Mapping[str, Any]
    ) -> None:
        self._processor = processor
        self._shift = shift
        self._remove_space = bool(settings.get("remove_space", False))
        self._lower_case = bool(settings.get("do_lower_case", False))
        names = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>")
        special = {name: processor.piece_to_id(name) + shift for name in names}
        typed = {str(settings.get(key) or name) for key, name in CHATGLM_TYPED.items()}
        super().__init__(
            Vocabulary(
                dialect=dialect,
                size=processor.vocab_size() + shift,
                special=special,
                typed_special={name: special[name] for name in typed if name in special},
                suffix_ids=(special["[gMASK]"], special["<sop>"]),
                rules=DecodingRules(EACH_BYTE, "drop_all", replacements=ENGLISH_CLEAN_UP),
            )
        )
        blanks = {f"<|blank_{length}|>": " " * length for length in range(2, LONGEST_BLANK + 1)}
        white_space = {"<n>": "\n", "<|tab|>": "\t", **blanks}
        self._white_space = {processor.piece_to_id(name): text.encode() for name, text in white_space.items()}

    def _encode_text(self, text: str) -> list[int]:
        if self._remove_space:
            text = " ".join(text.split())
        if self._lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(f" {{2,{LONGEST_BLANK}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return [token_id + self._shift for token_id in self._processor.encode(text)]

    def piece(self, token_id: int) -> Piece:
        token_id -= self._shift
        if not 0 <= token_id < self._processor.vocab_size():
            return NO_PIECE
        white_space = self._white_space.get(token_id)
        if white_space is not None:
            return Piece(white_space)
        if token_id == self._processor.unk_id():
            return Piece(" \u2047 ".encode(), is_special=True)
        return _piece(self._processor, token_id)


class ChatGlm2Tokenizer(Tokenizer):
    """ChatGLM2, ChatGLM3, CodeGeeX2: text is encoded as it is; the special ids stand after the file's pieces."""

    def __init__(self, processor: SentencePieceProcessor, dialect: Dialect) -> None:
        self._processor = processor
        roles = ROLE_TOKENS if dialect == "chatglm3" else ()
        num_pieces = processor.vocab_size()
        special = {name: num_pieces + index for index, name in enumerate((*MASK_TOKENS, *roles))}
        super().__init__(
            Vocabulary(
                dialect=dialect,
                size=num_pieces + len(special),
                special=special,
                typed_special={name: special[name] for name in roles},
                prefix_ids=(special["[gMASK]"], special["sop"]),
                rules=DecodingRules(EACH_BYTE, "drop_one"),
            )
        )
        # ChatGLM2 shows no special token in a decoded text, ChatGLM3 all of these.
        self._shown = {token_id: name.encode() for name, token_id in special.items()} if roles else {}

    def _encode_text(self, text: str) -> list[int]:
        return list(self._processor.encode(text))

    def piece(self, token_id: int) -> Piece:
        if not 0 <= token_id < self._processor.vocab_size() or token_id == self._processor.unk_id():
            return Piece(self._shown.get(token_id, b""), is_special=True)
        return _piece(self._processor, token_id)


def _piece(processor: SentencePieceProcessor, token_id: int) -> Piece:
    if processor.is_control(token_id):
        return NO_PIECE
    text: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return Piece(bytes([int(text[1:-1], 16)]))
    return Piece(text.replace(WORD_SPACE, " ").encode(), opens_with_space=text.startswith(WORD_SPACE))


def _load_processor(path: Path) -> SentencePieceProcessor:
    processor, found = SentencePieceProcessor(), read_tokenizer_file(path)
    try:
        processor.LoadFromSerializedProto(found)
    except (RuntimeError, OSError) as error:
        raise TokenizerError(
            f"{path} ({len(found)} bytes) is no complete SentencePiece model: download it again"
        ) from error
    return processor
