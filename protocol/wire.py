"""Message and tensors <-> frames: a msgpack header {"p", "v", "t", "b", "x"}, then one raw frame per tensor."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Raw, Struct

from protocol.control import Inspected
from protocol.data import Step
from protocol.errors import FrameError, MessageError, ProtocolError, TensorError, VersionError
from protocol.limits import (
    MAX_CLIENT_HEADER_BYTES,
    MAX_FRAMES,
    MAX_INSPECTED_BYTES,
    MAX_TENSOR_DIM,
    MAX_TENSOR_RANK,
    MAX_TENSORS,
)
from protocol.messages import MESSAGE_PLANES, Message, Plane
from protocol.tensors import FLOAT_DTYPES, RawTensor
from protocol.version import PROTOCOL_VERSION

PROTOCOL_WORD = "glmpipe"
MAX_QUOTED = 40
"""Characters of what a peer sent that an error may repeat."""
_QUOTING = re.compile(r"(Object contains unknown field|Invalid (?:enum )?value) [`'\"]")
_PLACE = re.compile(r" - at `\$[\w.\[\]]{0,80}`$")

Frame = bytes | memoryview

_Dim = Annotated[int, Meta(ge=0, le=MAX_TENSOR_DIM)]
_Dims = Annotated[tuple[_Dim, ...], Meta(max_length=MAX_TENSOR_RANK)]
_Descriptors = Annotated[tuple[tuple[str, _Dims], ...], Meta(max_length=MAX_TENSORS)]


class _Header(Struct, frozen=True, forbid_unknown_fields=True):
    """As it arrives: `b` and `x` are read once the rest is known to be ours."""

    p: str
    v: int
    t: str
    b: Raw
    x: Raw


class _StepHeader(Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The whole header of a Step, read at once: nearly all that ever arrives is one."""

    p: str
    v: int
    t: str
    b: Step
    x: tuple[tuple[str, tuple[_Dim, _Dim]]]


class _Opening(Struct):
    """What a header of any version, ours or not, can be asked for."""

    p: str = ""
    v: int | str | bool | None = None


class _Packed(Struct):
    """A header as it leaves."""

    p: str
    v: int
    t: str
    b: Message
    x: Sequence[tuple[str, tuple[int, ...]]]


_ENCODER = msgspec.msgpack.Encoder()
_HEADERS = msgspec.msgpack.Decoder(_Header)
_STEPS = msgspec.msgpack.Decoder(_StepHeader)
_OPENINGS = msgspec.msgpack.Decoder(_Opening)
_DESCRIPTORS: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_Descriptors)


class _Kind(NamedTuple):
    """A message type, where it belongs, and what reads its body."""

    type: type[Message]
    plane: Plane
    bodies: msgspec.msgpack.Decoder[Message]


_KINDS = {kind.__name__: _Kind(kind, plane, msgspec.msgpack.Decoder(kind)) for kind, plane in MESSAGE_PLANES.items()}


def encode(message: Message, tensors: Sequence[RawTensor] = ()) -> list[Frame]:
    """The frames of a message; the tensors' buffers are passed on uncopied.

    Raises ProtocolError for a message the other side would have to refuse.
    """
    name = type(message).__name__
    kind = _KINDS.get(name)
    if kind is None or kind.type is not type(message):
        raise MessageError(f"{name} is no message")
    _check_tensors(message, tensors)
    try:
        body = _ENCODER.encode(message)
    except UnicodeEncodeError as error:
        raise MessageError(f"a string that is not valid unicode: {error}", name) from None
    except (TypeError, ValueError, OverflowError) as error:
        raise MessageError(f"it cannot be written: {error}", name) from None
    arriving = _read_body(kind, body)
    if arriving != message:
        raise MessageError("a field is not of its declared type", name)
    packed = _pack(name, arriving, tensors)
    _check_header_size(len(packed), kind)
    return [packed, *[tensor.data for tensor in tensors]]


def encode_valid(message: Message, tensors: Sequence[RawTensor] = ()) -> list[Frame]:
    """As `encode`, unchecked: for what was decoded here, with no more than its own process's fields of their own types
    added."""
    return [_pack(type(message).__name__, message, tensors), *[tensor.data for tensor in tensors]]


def decode(frames: Sequence[Frame], plane: Plane | None = None) -> tuple[Message, tuple[RawTensor, ...]]:
    """The message in `frames` and its tensors, which refer to the frames' buffers.

    `plane` refuses messages of the other planes. Raises ProtocolError, and nothing else, for whatever was received.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise FrameError(f"{len(frames)} frames, expected 1 to {MAX_FRAMES}")
    limit = MAX_CLIENT_HEADER_BYTES if plane is None else plane.max_header_bytes
    if len(frames[0]) > limit:
        raise FrameError(f"a header of {len(frames[0])} bytes, at most {limit} are allowed")
    packed = bytes(frames[0])
    if plane is Plane.DATA and len(frames) == 2 and (step := _read_step(packed, frames[1])) is not None:
        return step
    header = _read_header(packed)
    kind = _kind(header.t, plane)
    if plane is None:
        _check_header_size(len(packed), kind)
    message = _read_body(kind, header.b)
    tensors = _attach(header.x, frames[1:])
    _check_tensors(message, tensors)
    if _pack(header.t, message, tensors) != packed:
        raise FrameError(
            f"the header of this {header.t} is not written the one way it can be: a key is repeated, out of order or "
            "left out, or a number is not in its field's form"
        )
    return message, tensors


def _pack(name: str, message: Message, tensors: Sequence[RawTensor]) -> bytes:
    """The one way in which a valid message with these tensors is written."""
    descriptors = [(tensor.dtype, tensor.shape) for tensor in tensors]
    return _ENCODER.encode(_Packed(PROTOCOL_WORD, PROTOCOL_VERSION, name, message, descriptors))


def _read_step(packed: bytes, buffer: Frame) -> tuple[Step, tuple[RawTensor]] | None:
    """A valid Step, its header read in one go. For None, `decode` finds out what it is instead, or what is wrong."""
    try:
        header = _STEPS.decode(packed)
        tensors = (RawTensor(*header.x[0], buffer),)
        _check_tensors(header.b, tensors)
    except Exception:
        return None
    is_step = header.p == PROTOCOL_WORD and header.v == PROTOCOL_VERSION and header.t == "Step"
    return (header.b, tensors) if is_step and _ENCODER.encode(header) == packed else None


def _read_header(packed: bytes) -> _Header:
    try:
        header = _HEADERS.decode(packed)
    except Exception as error:  # whatever the parser makes of hostile bytes, the fault is the sender's
        raise _header_fault(packed, error) from None
    if header.p != PROTOCOL_WORD or header.v != PROTOCOL_VERSION:
        raise _stranger(header.p, header.v)
    return header


def _header_fault(packed: bytes, error: Exception) -> ProtocolError:
    """Why this is no header of this version: it may be one of another."""
    try:
        opening = _OPENINGS.decode(packed)
    except Exception:  # not even that
        return FrameError(f"the header is no msgpack map as it should be: {_said(error)}")
    if opening.p != PROTOCOL_WORD or type(opening.v) is not int or opening.v != PROTOCOL_VERSION:
        return _stranger(opening.p, opening.v)
    return FrameError(f"the header's keys are not b, p, t, v, x with their kinds of values: {_said(error)}")


def _stranger(word: str, version: object) -> ProtocolError:
    if word != PROTOCOL_WORD:
        return FrameError(f'the header is not a map with "p" = "{PROTOCOL_WORD}"')
    return VersionError(
        f"the peer speaks protocol version {version!r:.20}, this program version {PROTOCOL_VERSION}: "
        "install the same glmpipe release on both sides"
    )


def _kind(name: str, plane: Plane | None) -> _Kind:
    kind = _KINDS.get(name)
    if kind is None:
        raise MessageError(f"{name!r:.40} is no message type")
    if plane is not None and kind.plane is not plane:
        raise MessageError(f"a {name} message does not belong on the {plane.value} plane")
    return kind


def _read_body(kind: _Kind, body: bytes | Raw) -> Message:
    try:
        return kind.bodies.decode(body)
    except MessageError as error:
        raise MessageError(error.text, kind.type.__name__) from None
    except Exception as error:  # as with headers
        raise MessageError(f"{_said(error)}", kind.type.__name__) from None


def _said(error: Exception) -> str:
    """The parser's words; what they quote of the peer's, which may be a prompt or have line breaks, is cut short."""
    text = str(error)
    quoting = _QUOTING.match(text)
    if quoting is None:
        return text[:200]
    place = _PLACE.search(text)
    quoted = text[quoting.end() : place.start() if place else len(text)]
    return f"{quoting[1]} {quoted[:-1][:MAX_QUOTED]!r}{place[0] if place else ''}"


def _check_header_size(num_bytes: int, kind: _Kind) -> None:
    if num_bytes > kind.plane.max_header_bytes:
        raise FrameError(
            f"a {kind.type.__name__} header of {num_bytes} bytes, at most {kind.plane.max_header_bytes} are allowed"
        )


def _attach(descriptors: Raw, buffers: Sequence[Frame]) -> tuple[RawTensor, ...]:
    try:
        described = _DESCRIPTORS.decode(descriptors)
    except Exception as error:  # as with headers
        raise TensorError(f'"x" is not at most {MAX_TENSORS} pairs of dtype and dimensions: {_said(error)}') from None
    if len(described) != len(buffers):
        raise TensorError(f"{len(described)} tensors described, {len(buffers)} received")
    return tuple([RawTensor(dtype, shape, buffers[at]) for at, (dtype, shape) in enumerate(described)])


def _check_tensors(message: Message, tensors: Sequence[RawTensor]) -> None:
    expected = 1 if type(message) is Step or type(message) is Inspected else 0
    if len(tensors) != expected:
        raise TensorError(f"{type(message).__name__} carries {expected} tensors, not {len(tensors)}")
    if type(message) is Step:
        tensor = tensors[0]
        if len(tensor.shape) != 2 or tensor.shape[0] != message.num_tokens or tensor.dtype not in FLOAT_DTYPES:
            raise TensorError(
                f"a Step of {message.num_tokens} tokens carries {tensor.dtype} {list(tensor.shape)}, "
                "not floats [num_tokens, hidden_size]"
            )
    elif expected and tensors[0].dtype != "float32":
        raise TensorError(f"Inspected carries a {tensors[0].dtype} tensor, not float32")
    elif expected and tensors[0].num_bytes > MAX_INSPECTED_BYTES:
        raise TensorError(f"Inspected carries {tensors[0].num_bytes} bytes, at most {MAX_INSPECTED_BYTES} are allowed")
