"""Whatever arrives, decode answers with a message or a ProtocolError, and nothing else."""

import copy
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.client import Generate, TextPrompt, TokenPrompt
from protocol.control import Assign, Failed, Ping
from protocol.data import DropSequence, Span, StageTiming, Step
from protocol.errors import FrameError, MessageError, ProtocolError, TensorError, VersionError
from protocol.messages import Plane
from protocol.tensors import RawTensor
from protocol.version import PROTOCOL_VERSION
from protocol.wire import decode, encode

STEP = Step(
    3, 9, (DropSequence(4),), (Span(1, 5, 2, None, None), Span(2, 0, 1, 1, 0)), (StageTiming(0, 1.0, 0.5, 1.5, 7),)
)
FRAMES = encode(STEP, (RawTensor("float32", (3, 4), bytes(48)),))
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8) | st.binary()
PLAIN = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner), max_leaves=9
)


def header() -> dict[str, Any]:
    """The valid step's header, to be spoiled."""
    return copy.deepcopy(msgpack.unpackb(FRAMES[0]))


def refused(spoiled: Any, *buffers: bytes) -> ProtocolError:
    """The error that a header with these buffers gives."""
    with pytest.raises(ProtocolError) as caught:
        decode([msgpack.packb(spoiled), *(buffers or (bytes(48),))])
    return caught.value


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=200), max_size=7))
def test_random_bytes(frames: list[bytes]) -> None:
    """Random frames, any number of them."""
    with pytest.raises(ProtocolError):
        decode(frames)


@settings(max_examples=300, deadline=None)
@given(plain=PLAIN, key=st.sampled_from(["p", "v", "t", "b", "x"]))
def test_random_values_in_the_header(plain: Any, key: str) -> None:
    """A well-formed header with any value in any place; whatever passes is a step again."""
    spoiled = {**header(), key: plain}
    try:
        message, _ = decode([msgpack.packb(spoiled), bytes(48)])
    except ProtocolError:
        return
    assert isinstance(message, Step)


@settings(max_examples=300, deadline=None)
@given(plain=PLAIN, data=st.data())
def test_random_values_in_the_fields(plain: Any, data: st.DataObject) -> None:
    """Any value in any field, nested ones included."""
    spoiled = header()
    place = spoiled["b"]
    nested = data.draw(st.sampled_from([None, "spans", "updates", "timings"]))
    place = place if nested is None else place[nested][0]
    place[data.draw(st.sampled_from(sorted(place)))] = plain
    try:
        decode([msgpack.packb(spoiled), bytes(48)])
    except ProtocolError:
        return


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_flipped_and_truncated_bytes(data: st.DataObject) -> None:
    """A valid header cut short, and one with a byte changed."""
    whole = bytes(FRAMES[0])
    index = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ProtocolError):
        decode([whole[:index], bytes(48)])
    flipped = bytearray(whole)
    flipped[index] ^= data.draw(st.integers(1, 255))
    try:
        decode([bytes(flipped), bytes(48)])
    except ProtocolError:
        return


def set_in(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one place in a header."""

    def change(spoiled: dict[str, Any]) -> None:
        place = spoiled
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (set_in("p", to="http"), FrameError, '"glmpipe"'),
        (set_in("v", to=1), VersionError, f"version 1, this program version {PROTOCOL_VERSION}: install the same"),
        (set_in("v", to=True), VersionError, "version True"),
        (set_in("t", to="Stop"), MessageError, "'Stop' is no message type"),
        (set_in("t", to="Ping"), MessageError, "Ping: Object contains unknown field 'epoch'"),
        (set_in("extra", to=1), FrameError, "keys"),
        (set_in("b", to=[]), MessageError, "Step: Expected `object`, got `array`"),
        (set_in("b", "epoch", to=-1), MessageError, r"Step: Expected `int` >= 0 - at `\$.epoch`"),
        (set_in("b", "epoch", to=2**64 - 1), MessageError, "Step: Expected `int` <= 9223372036854775807"),
        (set_in("b", "epoch", to=True), MessageError, r"got `bool` - at `\$.epoch`"),
        (set_in("b", "epoch", to=1.0), MessageError, "Expected `int`, got `float`"),
        (set_in("b", "spans", 1, "num_tokens", to=0), MessageError, r"`int` >= 1 - at `\$.spans\[1\].num_tokens`"),
        (set_in("b", "spans", 0, "mask_position", to=3), MessageError, "needs a context_length"),
        (set_in("b", "spans", 1, "sequence_id", to=1), MessageError, "two spans"),
        (set_in("b", "spans", to=[[]] * 2000), MessageError, r"length <= 1024 - at `\$.spans`"),
        (set_in("b", "updates", 0, "t", to="Span"), MessageError, r"'Span' - at `\$.updates\[0\].t`"),
        (set_in("b", "timings", 0, "compute_s", to=float("nan")), MessageError, r"`float` .*\[0\].compute_s"),
        (set_in("b", "timings", 0, "compute_s", to=float("inf")), MessageError, r"`float` <= .*\[0\].compute_s"),
        (set_in("b", "timings", 0, "compute_s", to=1), FrameError, "in its field's form"),
        (set_in("x", to=[]), TensorError, "0 tensors described, 1 received"),
        (set_in("x", to=[["float32", [3, 4]]] * 5), TensorError, "at most 4"),
        (set_in("x", 0, 0, to="float64"), TensorError, "'float64' is none of"),
        (set_in("x", 0, 0, to={}), TensorError, "Expected `str`, got `object`"),
        (set_in("x", 0, 1, to=[3, 5]), TensorError, r"float32 \[3, 5\] takes 60 bytes, the frame has 48"),
        (set_in("x", 0, 1, to=[4, 3]), TensorError, r"3 tokens carries float32 \[4, 3\]"),
        (set_in("x", 0, 1, to=[3, -4]), TensorError, "dimension"),
        (set_in("x", 0, 1, to=[True, 12]), TensorError, "dimension"),
        (set_in("x", 0, 1, to=[2**31 - 1] * 4), TensorError, "at most 67108864"),
        (set_in("x", 0, 1, to=[1] * 9), TensorError, "length <= 4"),
        (set_in("x", 0, 1, to=12), TensorError, "pair"),
    ],
)
def test_faults_are_named(change: Callable[[dict[str, Any]], None], error: type[Exception], words: str) -> None:
    """Each kind of fault has its error class, and the text says where and what."""
    spoiled = header()
    change(spoiled)
    with pytest.raises(error, match=words):
        raise refused(spoiled)


SECRET = "my secret\n\x1b[2J" + "and long " * 30


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("b", SECRET, to=1), "unknown field"),
        (set_in("b", "updates", 0, "t", to=SECRET), r"Invalid value .*at `\$.updates\[0\].t`"),
        (set_in("b", "updates", 0, SECRET, to=3), r"unknown field .*at `\$.updates\[0\]`"),
        (set_in(SECRET, to=1), "unknown field"),
        (set_in("t", to=SECRET), "no message type"),
        (set_in("p", to=SECRET), "glmpipe"),
        (set_in("v", to=SECRET), "version"),
        (set_in("x", 0, 0, to=SECRET), "dtype"),
        (set_in("x", 0, to=SECRET), "pairs of dtype"),
    ],
)
def test_little_of_what_a_peer_sent_is_repeated(change: Callable[[dict[str, Any]], None], words: str) -> None:
    """Errors go to logs: no line breaks, no escape codes, and no more than 40 characters of anybody's text."""
    spoiled = header()
    change(spoiled)
    error = refused(spoiled)
    assert str(error).isprintable()
    assert len(str(error)) < 250
    assert SECRET[20:] not in str(error)
    assert "and long and long and long and" not in str(error)
    assert re.search(words, str(error))


def test_a_repeated_key_is_refused() -> None:
    """A map may not say two things about one field."""
    body = bytes([0x82]) + (msgpack.packb("request_id") + msgpack.packb(1)) * 2
    packed = bytes([0x85]) + b"".join(
        msgpack.packb(key) + value
        for key, value in {
            "p": msgpack.packb("glmpipe"),
            "v": msgpack.packb(PROTOCOL_VERSION),
            "t": msgpack.packb("Ping"),
            "b": body,
            "x": msgpack.packb([]),
        }.items()
    )
    with pytest.raises(FrameError, match="repeated"):
        decode([packed])


@pytest.mark.parametrize("depth", [100, 2000, 100_000])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a"])
def test_nested_bombs(depth: int, opening: bytes) -> None:
    """Containers in containers to any depth."""
    with pytest.raises(ProtocolError):
        decode([opening * depth + b"\xc0"])


@pytest.mark.parametrize(
    "bomb", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9" + b"\xff" * 5]
)
def test_a_claimed_length_allocates_nothing(bomb: bytes) -> None:
    """Five bytes that claim four thousand million entries are refused without making room for them."""
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decode([bomb])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_many_tiny_containers_are_stopped_early() -> None:
    """A header of megabytes of empty maps does not become hundreds of megabytes of dicts."""
    for item in (b"\x80", b"\x90"):
        bomb = (b"\xdc\xff\xff" + item * 65535) * 60
        tracemalloc.start()
        try:
            with pytest.raises(FrameError, match="Expected `object`, got `array`"):
                decode([b"\xdc\x00\x3c" + bomb])
            assert tracemalloc.get_traced_memory()[1] < 2**24
        finally:
            tracemalloc.stop()


def test_header_limits_per_plane() -> None:
    """A header larger than its plane allows is refused unread; the client plane takes a long prompt."""
    long = Generate(1, TextPrompt("字" * 2**20), None)
    assert decode(encode(long), Plane.CLIENT)[0] == long
    ids = Generate(1, TokenPrompt(tuple(range(2**20 - 1))), None)
    assert decode(encode(ids), Plane.CLIENT)[0] == ids
    for plane in (Plane.CONTROL, Plane.DATA):
        with pytest.raises(FrameError, match="at most"):
            decode(encode(long), plane)
    padded = {"p": "glmpipe", "v": PROTOCOL_VERSION, "t": "Ping", "b": {"request_id": 1}, "x": [], "y": "a" * 2**18}
    with pytest.raises(FrameError):
        decode([msgpack.packb(padded)])


def test_planes_do_not_mix() -> None:
    """A control message on a data socket is refused, and so on."""
    with pytest.raises(MessageError, match="Ping message does not belong on the data plane"):
        decode(encode(Ping(1)), Plane.DATA)


@pytest.mark.parametrize(
    ("message", "tensors", "error"),
    [
        (Ping(-1), (), MessageError),
        (Ping(True), (), MessageError),
        (Failed(1, 1, "whatever", "text"), (), MessageError),  # type: ignore[arg-type]
        (Failed(1, 1, "internal", "x" * 20_000), (), MessageError),
        (Failed(1, 1, "internal", "\ud800"), (), MessageError),
        (Step(1, 2, [], (), ()), (RawTensor("float32", (0, 4), b""),), MessageError),  # type: ignore[arg-type]
        (Step(1, 2, (), (), ()), (), TensorError),
        (Step(1, 2, (), (), ()), (RawTensor("int64", (0, 4), b""),), TensorError),
        (Ping(1), (RawTensor("uint8", (1,), b"x"),), TensorError),
        ("Ping", (), MessageError),
    ],
)
def test_nothing_invalid_is_sent(message: Any, tensors: tuple[RawTensor, ...], error: type[Exception]) -> None:
    """encode refuses what decode would refuse."""
    with pytest.raises(error):
        encode(message, tensors)


def test_impossible_assignments_cannot_be_built() -> None:
    """An empty layer range, a stage beyond the last one or epoch 0 is no Assign at all."""
    fields = (1, 1, 0, 2, "/model", None, "", 3, 5, "fp32", 100, "ipc:///tmp/x", None, None, None, False)
    assert decode(encode(Assign(*fields)))[0] == Assign(*fields)
    with pytest.raises(MessageError, match="empty"):
        Assign(*fields[:7], 5, *fields[8:])
    with pytest.raises(MessageError, match="stage 2 of 2"):
        Assign(1, 1, 2, *fields[3:])
    with pytest.raises(MessageError, match="epoch 0"):
        Assign(1, 0, *fields[2:])
