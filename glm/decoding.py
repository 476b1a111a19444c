"""From token ids to text, one id at a time: what is shown is final, and never half a character.

Every transformer here is a small automaton with `push` and `flush`: the concatenation of what the pushes and the flush
return is the transformed whole, however the input was cut. The cost of a push does not grow with what came before.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

# One U+FFFD per undecodable byte, as SentencePiece does; "replace" gives one per broken sequence, as the others do.
EACH_BYTE = "glmpipe.each-byte"


def _replace_one_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd", error.start + 1


codecs.register_error(EACH_BYTE, _replace_one_byte)


class Piece(NamedTuple):
    """What one token id stands for: UTF-8 bytes, possibly a part of a character."""

    data: bytes
    is_special: bool = False
    opens_with_space: bool = False
    """The first byte is a space that marks a word's beginning."""


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """How the pieces of a tokenizer become text."""

    utf8_errors: str = "replace"
    leading_spaces: Literal["keep", "drop_one", "drop_all"] = "keep"
    """Word-beginning spaces before the first text: the dummy prefix that encoding added."""
    special_separator: str = ""
    """Stands between a special token and its neighbours when special tokens are shown."""
    replacements: tuple[tuple[str, str], ...] = ()
    """Applied to the whole text, one after the other."""


class PieceSource(Protocol):
    """What decoding needs to know of a tokenizer."""

    @property
    def rules(self) -> DecodingRules: ...

    def piece(self, token_id: int) -> Piece: ...


class IncrementalDecoder:
    """Text of a growing sequence of token ids.

    A character that spreads over several ids appears with its last one; bytes that can no longer become a
    character appear as U+FFFD.
    """

    def __init__(self, tokenizer: PieceSource, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._rules = tokenizer.rules
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._rules.utf8_errors)
        self._replacers = [StreamReplacer(old, new) for old, new in self._rules.replacements]
        self._drops_spaces = self._rules.leading_spaces != "keep"
        self._last: Literal["nothing", "text", "special"] = "nothing"

    def push(self, token_id: int) -> str:
        """The text that became final with this id, often a word, sometimes nothing."""
        piece = self._tokenizer.piece(token_id)
        if piece.is_special:
            return "" if self._skip_special else self._replace(self._special(piece.data))
        data = self._without_leading_space(piece)
        return self._replace(self._separator("text", data) + self._utf8.decode(data))

    def flush(self) -> str:
        """What was held back; the text ends here."""
        text = self._utf8.decode(b"", final=True)
        for index, replacer in enumerate(self._replacers):
            text = replacer.push(text) + replacer.flush()
            self._replacers[index] = StreamReplacer(replacer.old, replacer.new)
        return text

    def _special(self, data: bytes) -> str:
        broken = self._utf8.decode(b"", final=True)
        self._drops_spaces = self._drops_spaces and not data
        return broken + self._separator("special", data) + data.decode()

    def _separator(self, kind: Literal["text", "special"], data: bytes) -> str:
        if not data:
            return ""
        last, self._last = self._last, kind
        touches_special = last != "nothing" and "special" in (last, kind)
        return self._rules.special_separator if touches_special else ""

    def _without_leading_space(self, piece: Piece) -> bytes:
        if not self._drops_spaces or not piece.data:
            return piece.data
        data = piece.data[1:] if piece.opens_with_space else piece.data
        self._drops_spaces = self._rules.leading_spaces == "drop_all" and not data
        return data

    def _replace(self, text: str) -> str:
        for replacer in self._replacers:
            text = replacer.push(text)
        return text


def decode(tokenizer: PieceSource, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of all ids at once."""
    decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
    return "".join(decoder.push(token_id) for token_id in token_ids) + decoder.flush()


class StreamReplacer:
    """`str.replace(old, new)` on a stream of text."""

    def __init__(self, old: str, new: str) -> None:
        self.old = old
        self.new = new
        self._held = ""

    def push(self, text: str) -> str:
        if not text:
            return ""
        *replaced, rest = (self._held + text).split(self.old)
        keep = _length_of_open_prefix(rest, (self.old,))
        self._held = rest[len(rest) - keep :]
        return self.new.join([*replaced, rest[: len(rest) - keep]])

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class StopStringMatcher:
    """Passes text on until a stop string is complete, which is swallowed together with all that follows.

    Text that could be the beginning of a stop string is held back. The stop string that is complete first wins; of
    those that end at the same character, the longest. So the outcome does not depend on how the text was cut.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._found: str | None = None

    @property
    def found(self) -> str | None:
        """The stop string that ended the text, if one did."""
        return self._found

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        if self._found is not None:
            return ""
        text = self._held + text
        matches = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if matches:
            end, _, self._found = min(matches)
            self._held = ""
            return text[: end - len(self._found)]
        keep = _length_of_open_prefix(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back and did not become a stop string; the text ends here."""
        held, self._held = self._held, ""
        return held


def _length_of_open_prefix(text: str, patterns: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a beginning, but not the whole, of a pattern."""
    longest = max((len(pattern) for pattern in patterns), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        tail = text[len(text) - length :]
        if any(len(pattern) > length and pattern.startswith(tail) for pattern in patterns):
            return length
    return 0
