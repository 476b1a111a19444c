"""What a peer may send: whatever arrives is a valid message or a ProtocolError, soon and cheaply."""

import struct
from collections.abc import Sequence
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from fuzz.mutation import pack, spoiled_bytes, spoiled_tree, unpack
from fuzz.target import Finding, Target, allocating_at_most
from protocol.control import Inspected
from protocol.data import Step
from protocol.errors import ProtocolError
from protocol.messages import MESSAGE_PLANES, Plane
from protocol.records import Record
from protocol.tensors import RawTensor
from protocol.wire import decode, encode

SMALL_COST_BYTES = 8 * 2**20
"""What a header of at most 64 KiB may cost, made of the worst there is: nothing but empty maps."""
COST_PER_BYTE = 28
"""Of memory, for each byte of a larger header: short strings and empty extensions take the most."""
_PLANES = (None, None, *Plane)


def seeds() -> list[bytes]:
    """Some messages of every type, with their tensors."""
    rng = Random(1)
    return [joined(encode(message, _tensors(message))) for cls in MESSAGE_PLANES for message in _some(cls, rng, 3)]


def check(data: bytes) -> None:
    """Decode, as a socket of some plane or of none would; what passes must say the same again."""
    frames, plane = split(data), _PLANES[len(data) % len(_PLANES)]
    size = len(frames[0]) if frames else 0
    try:
        with allocating_at_most(SMALL_COST_BYTES + COST_PER_BYTE * size):
            message, tensors = decode(frames, plane)
    except ProtocolError:
        return
    if plane is not None and MESSAGE_PLANES[type(message)] is not plane:
        raise Finding(f"a {type(message).__name__} passed on the {plane.value} plane")
    if decode(encode(message, tensors), plane) != (message, tensors):
        raise Finding(f"a {type(message).__name__} does not say the same again")


def mutate(data: bytes, other: bytes, rng: Random) -> bytes:
    """One to three things wrong: in the header's tree, in its bytes, or in how many frames there are."""
    frames, others = split(data), split(other)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not frames or rng.random() < 0.1:
            frames = _spoiled_frames(frames, others, rng)
        elif rng.random() < 0.3:
            index = rng.randrange(len(frames))
            frames[index] = spoiled_bytes(frames[index], others[0] if others else b"", rng)
        else:
            frames[0] = _spoiled_header(frames[0], others, rng)
    return joined(frames)


def joined(frames: Sequence[bytes | memoryview]) -> bytes:
    """Frames as one input: each after its length."""
    return b"".join(struct.pack("<I", len(frame)) + bytes(frame) for frame in frames)


def split(data: bytes) -> list[bytes]:
    """The frames of an input; a length that goes beyond the end means the rest."""
    frames, place = [], 0
    while place + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, place)
        frames.append(data[place + 4 : place + 4 + length])
        place += 4 + length
    return frames


def _spoiled_header(header: bytes, others: list[bytes], rng: Random) -> bytes:
    try:
        tree = unpack(header)
        other = unpack(others[0]) if others else None
        return pack(spoiled_tree(tree, other, rng))
    except Exception:  # spoiled before, or nested too deeply to be packed again
        return spoiled_bytes(header, others[0] if others else b"", rng)


def _spoiled_frames(frames: list[bytes], others: list[bytes], rng: Random) -> list[bytes]:
    match rng.randrange(5):
        case 0:
            return [*frames, rng.choice((b"", b"x", rng.randbytes(64)))]
        case 1:
            return frames[:-1]
        case 2:
            return frames[::-1]
        case 3:
            return [*frames[:1], *others[1:]]
        case _:
            return [*frames, *frames] * rng.choice((1, 3))


def _some(cls: Any, rng: Random, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        try:
            message = _value(cls, None, rng)
            encode(message, _tensors(message))
        except ProtocolError:  # drawn fields that do not go together
            continue
        found.append(message)
    return found


def _value(annotation: Any, bound: Any, rng: Random) -> Any:
    """Any value of a field, from its annotation: a new message is fuzzed without a new line here."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _value(args[0], args[1], rng)
    if origin in (Union, UnionType):
        return _value(rng.choice(args), bound, rng)
    if origin is Literal:
        return rng.choice(args)
    if origin is tuple:
        return tuple(_value(args[0], None, rng) for _ in range(min(bound.max_length, rng.randrange(4))))
    if isinstance(annotation, type) and issubclass(annotation, Record):
        hints = get_type_hints(annotation, include_extras=True)
        fields = {field.name: _value(hints[field.name], None, rng) for field in msgspec.structs.fields(annotation)}
        return annotation(**fields)
    if annotation is int:
        return rng.choice((bound.ge, min(bound.le, bound.ge + rng.randrange(300)), bound.ge + 1))
    if annotation is float:
        return rng.choice((bound.ge, bound.le, bound.ge + (bound.le - bound.ge) * rng.random()))
    if annotation is NoneType:
        return None
    return rng.random() < 0.5 if annotation is bool else "模型 x"[: rng.randrange(5)]


def _tensors(message: Any) -> tuple[RawTensor, ...]:
    if isinstance(message, Step):
        if message.num_tokens > 2000:
            raise ProtocolError("too long for a seed")
        return (RawTensor("float16", (message.num_tokens, 2), bytes(4 * message.num_tokens)),)
    return (RawTensor("float32", (2, 1, 3), bytes(24)),) if isinstance(message, Inspected) else ()


FRAMES = Target("frames", seeds, mutate, check)
