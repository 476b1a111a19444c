"""The one filter between text of others and a terminal or a log."""

import itertools
import json

import pytest

from glm.printable import PrintableStream, num_columns, padded, printable_json, printable_line, printable_lines

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x00\u202eabc\u2066\ud83d\u2028"
HARMLESS = "你好，世界 👩‍👩‍👧 مي‌خواهم é \u200e 'quoted' \\n"


def stream(parts: list[str]) -> str:
    """All that a stream lets through."""
    filtered = PrintableStream()
    return "".join(map(filtered.push, parts)) + filtered.flush()


def test_nothing_a_terminal_would_obey_gets_through() -> None:
    """Escapes, C1, DEL, NUL, overrides of direction, other line ends, halves of pairs."""
    escaped = r"\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x00\u202eabc\u2066\ud83d\u2028"
    assert printable_line(HOSTILE) == escaped
    assert stream([HOSTILE]) == "\ufffd]0;title\ufffd\ufffd[2J\ufffd31m\ufffd\ufffd\ufffdabc\ufffd\ufffd\ufffd"
    for text in (printable_line(HOSTILE), printable_lines(HOSTILE), stream([HOSTILE])):
        text.encode()
        assert text.isprintable()


@pytest.mark.parametrize("show", [printable_line, printable_lines, lambda text: stream([text])])
def test_ordinary_text_stays(show) -> None:
    """Wide characters, joined emoji, marks of direction and backslashes are not touched."""
    assert show(HARMLESS) == HARMLESS


def test_columns_of_a_terminal() -> None:
    """Wide characters take two, joined marks none; padding counts them so."""
    assert [num_columns(text) for text in ("ab", "你好", "é", "e\u0301", "，", "")] == [2, 4, 1, 1, 2, 0]
    assert padded("你好", 6) == "你好  " and padded("toolong", 3) == "toolong"


def test_json_means_the_same() -> None:
    """What `json.dumps` leaves raw beyond ASCII is escaped, and reads back as it was."""
    value = {"text": HOSTILE + HARMLESS}
    text = printable_json(json.dumps(value, ensure_ascii=False))
    assert printable_line(text) == text and HARMLESS[:-3] in text
    assert json.loads(text) == value


def test_line_ends() -> None:
    """A line has none; several lines and a stream keep newlines and tabs; only a stream takes CRLF for one."""
    assert printable_line("a\r\n\tb\n[launch] forged") == r"a\r\n\tb\n[launch] forged"
    assert printable_lines("a\r\n\tb\n") == "a\\r\n\tb\n"
    assert stream(["a\r\n\tb\rc\n"]) == "a\n\tb\ufffdc\n"


def test_a_stream_does_not_depend_on_its_cuts() -> None:
    """Also where a carriage return and its newline come apart, or nothing follows it."""
    text = "a\r\n\r\x1bb\r\r\n\r"
    expected = "a\n\ufffd\ufffdb\ufffd\n\ufffd"
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, len(text)), n) for n in range(4)):
        ends = [0, *cuts, len(text)]
        assert stream([text[a:b] for a, b in itertools.pairwise(ends)]) == expected
