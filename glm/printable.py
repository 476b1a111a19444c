"""One filter for text that others wrote (a model, a file, another host) on its way to a terminal or a log.

A terminal obeys control characters: they rewrite what stands there, set titles, and can make it type. Line ends in a
name forge lines of a log. Bidirectional overrides show a line in another order than it has. None of these gets through.
"""

import re
import unicodedata

from glm.decoding import StreamReplacer

REPLACEMENT = "\ufffd"

# C0, DEL and C1; the separators that some programs take for line ends; bidirectional overrides; lone surrogates, which
# no stream can encode. Joiners and marks, which emoji and Persian need, are not among them.
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_NOT_IN_A_LINE = re.compile(f"[{_CONTROLS}]")
_NOT_IN_LINES = re.compile(rf"(?![\n\t])[{_CONTROLS}]")


def printable_line(text: str) -> str:
    r"""For a name or a message inside a line: control characters as Python writes them, such as `\x1b` and `\n`."""
    return _NOT_IN_A_LINE.sub(_escaped, text)


def printable_lines(text: str) -> str:
    """As `printable_line` for a text of several lines: newlines and tabs stay."""
    return _NOT_IN_LINES.sub(_escaped, text)


def printable_json(text: str) -> str:
    r"""For JSON that `json.dumps` left unescaped beyond ASCII: the same value, control characters as `\u009b`."""
    return _NOT_IN_LINES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def num_columns(text: str) -> int:
    """How many columns of a terminal a text takes: wide characters two, marks that join another character none."""
    return sum(_columns(character) for character in text)


def padded(text: str, width: int) -> str:
    """The text with spaces behind it, so that it takes `width` columns at least."""
    return text + " " * (width - num_columns(text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


class PrintableStream:
    """What a model says, piece by piece, as a terminal may get it.

    Newlines and tabs stay, `\\r\\n` becomes a newline, and any other control character U+FFFD. As the automata of
    `glm.decoding`: what the pushes and the flush return is the same however the text was cut.
    """

    def __init__(self) -> None:
        self._line_ends = StreamReplacer("\r\n", "\n")

    def push(self, text: str) -> str:
        """What can be shown now."""
        return _NOT_IN_LINES.sub(REPLACEMENT, self._line_ends.push(text))

    def flush(self) -> str:
        """What was held back; the text ends here."""
        return _NOT_IN_LINES.sub(REPLACEMENT, self._line_ends.flush())


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
