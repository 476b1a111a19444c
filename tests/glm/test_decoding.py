"""Streams of text: pushes and flush add up to the whole, nothing is shown too early, nothing is held too long."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from glm.decoding import EACH_BYTE, DecodingRules, IncrementalDecoder, Piece, StopStringMatcher, StreamReplacer, decode

FEW_LETTERS = st.text(alphabet="ab ", max_size=30)


@dataclass
class Bytes:
    """A tokenizer whose ids are bytes; 256 and up are special."""

    rules: DecodingRules = field(default_factory=DecodingRules)

    def piece(self, token_id: int) -> Piece:
        if token_id >= 256:
            return Piece(f"<{token_id}>".encode(), is_special=True)
        return Piece(bytes([token_id]), opens_with_space=token_id == 0x20)


def pushes(decoder: IncrementalDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@given(st.text(max_size=30))
def test_a_character_appears_whole_and_at_once(text: str) -> None:
    """Fed byte by byte, each character appears with its last byte."""
    text = text.encode("utf-8", "replace").decode()
    decoder, shown = IncrementalDecoder(Bytes()), []
    for character in text:
        parts = [decoder.push(byte) for byte in character.encode()]
        assert parts == [""] * (len(parts) - 1) + [character]
        shown += parts
    assert decoder.flush() == ""
    assert "".join(shown) == text


@given(st.lists(st.integers(0, 300), max_size=20))
def test_broken_bytes_are_replaced_as_python_does(ids: list[int]) -> None:
    """Special tokens left out, the text is that of the bytes."""
    data = bytes(token_id for token_id in ids if token_id < 256)
    assert "".join(pushes(IncrementalDecoder(Bytes()), ids)) == data.decode("utf-8", "replace")


def test_each_broken_byte_can_have_its_own_mark() -> None:
    """SentencePiece's way: one replacement character per byte, also across pushes."""
    rules = DecodingRules(EACH_BYTE)
    assert decode(Bytes(rules), [0xF0, 0x9F, 0x91]) == "\ufffd" * 3
    assert pushes(IncrementalDecoder(Bytes(rules)), [0xF0, 0x9F, 0x41]) == ["", "", "\ufffd\ufffdA", ""]
    assert decode(Bytes(rules), [0xED, 0xA0, 0x80]) == "\ufffd" * 3


def test_shown_special_tokens_end_a_broken_character() -> None:
    """A special token never appears inside a character, and its neighbours can be set apart."""
    ids = [256, 0x61, 0xE4, 257, 258, 0x62]
    assert decode(Bytes(), ids, skip_special=False) == "<256>a\ufffd<257><258>b"
    assert decode(Bytes(DecodingRules(special_separator=" ")), ids, skip_special=False) == "<256> a\ufffd <257> <258> b"


def test_the_space_that_encoding_added_goes() -> None:
    """At the beginning only: one space, or all of them."""
    ids = [0x20, 0x20, 0x61, 0x20, 0x62]
    assert decode(Bytes(), ids) == "  a b"
    assert decode(Bytes(DecodingRules(leading_spaces="drop_one")), ids) == " a b"
    assert decode(Bytes(DecodingRules(leading_spaces="drop_all")), ids) == "a b"
    assert decode(Bytes(DecodingRules(leading_spaces="drop_one")), [256, *ids], skip_special=False) == "<256>  a b"


@given(st.lists(st.text(alphabet=" .,'snt", max_size=4), max_size=12))
def test_replacements_apply_to_the_whole_text(parts: list[str]) -> None:
    """One after the other on a stream gives what `str.replace` gives on the whole, flushes included."""
    pairs = ((" .", "."), (" ' ", "'"), (" n't", "n't"), ("  ", " "))
    text = "".join(parts)
    expected = text
    for old, new in pairs:
        expected = expected.replace(old, new)
    decoder = IncrementalDecoder(Bytes(DecodingRules(replacements=pairs)))
    assert "".join(decoder.push(byte) for byte in text.encode()) + decoder.flush() == expected


@given(parts=st.lists(FEW_LETTERS, max_size=8), old=st.text(alphabet="ab ", min_size=1, max_size=4))
def test_replacing_on_a_stream(parts: list[str], old: str) -> None:
    """Wherever the text is cut, also inside a match or a false start of one."""
    replacer = StreamReplacer(old, "X")
    assert "".join(map(replacer.push, parts)) + replacer.flush() == "".join(parts).replace(old, "X")


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What a matcher must do, said plainly: try every end, and at each the longest stop string first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=3)


@given(parts=st.lists(FEW_LETTERS, max_size=8), stops=STOPS)
def test_a_stop_string_ends_the_text(parts: list[str], stops: list[str]) -> None:
    """Nothing of a stop string is shown, nothing before it is lost, however the text was cut."""
    matcher = StopStringMatcher(stops)
    shown = "".join(map(matcher.push, parts)) + matcher.flush()
    assert (shown, matcher.found) == cut_at_stop("".join(parts), stops)


@given(text=FEW_LETTERS, stops=STOPS)
def test_only_a_possible_beginning_is_held_back(text: str, stops: list[str]) -> None:
    """What is held back always could still become a stop string."""
    matcher, shown = StopStringMatcher(stops), ""
    for index, letter in enumerate(text):
        shown += matcher.push(letter)
        if matcher.found is not None:
            break
        held = text[len(shown) : index + 1]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_no_stop_strings_hold_nothing() -> None:
    """The usual case passes text through."""
    matcher = StopStringMatcher(())
    assert matcher.push("any text") == "any text"
    assert matcher.flush() == ""
