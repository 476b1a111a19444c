"""Message and tensors <-> frames: a msgpack header {"p", "v", "t", "b", "x"}, then one raw frame per tensor."""

from collections.abc import Sequence
from typing import Any

import msgpack

from protocol.control import Inspected
from protocol.data import Step
from protocol.errors import FrameError, MessageError, TensorError, VersionError
from protocol.limits import (
    MAX_CLIENT_HEADER_BYTES,
    MAX_CONTAINERS,
    MAX_FRAMES,
    MAX_INSPECTED_BYTES,
    MAX_MAP_KEYS,
    MAX_TENSORS,
    SMALL_HEADER_BYTES,
)
from protocol.messages import MESSAGE_PLANES, Message, Plane
from protocol.schema import record_coder
from protocol.tensors import FLOAT_DTYPES, RawTensor
from protocol.version import PROTOCOL_VERSION

PROTOCOL_WORD = "glmpipe"
HEADER_KEYS = frozenset({"p", "v", "t", "b", "x"})

Frame = bytes | memoryview

_TYPES = {message_type.__name__: message_type for message_type in MESSAGE_PLANES}
_CODERS = {message_type: record_coder(message_type) for message_type in MESSAGE_PLANES}
_MAX_HEADER_BYTES = {message_type: plane.max_header_bytes for message_type, plane in MESSAGE_PLANES.items()}


def encode(message: Message, tensors: Sequence[RawTensor] = ()) -> list[Frame]:
    """The frames of a message; the tensors' buffers are passed on uncopied.

    Raises ProtocolError for a message the other side would have to refuse.
    """
    message_type = type(message)
    if message_type not in _CODERS:
        raise MessageError(f"{message_type.__name__} is no message")
    _check_tensors(message, tensors)
    try:
        header = {
            "p": PROTOCOL_WORD,
            "v": PROTOCOL_VERSION,
            "t": message_type.__name__,
            "b": _CODERS[message_type].dump(message),
            "x": [(tensor.dtype, tensor.shape) for tensor in tensors],
        }
        packed: bytes = msgpack.packb(header)
    except MessageError as error:
        raise error.inside(message_type.__name__) from None
    except UnicodeEncodeError as error:
        raise MessageError(f"a string that is not valid unicode: {error}", message_type.__name__) from None
    _check_header_size(len(packed), message_type)
    return [packed, *(tensor.data for tensor in tensors)]


def decode(frames: Sequence[Frame], plane: Plane | None = None) -> tuple[Message, tuple[RawTensor, ...]]:
    """The message in `frames` and its tensors, which refer to the frames' buffers.

    `plane` refuses messages of the other planes. Raises ProtocolError, and nothing else, for whatever was received.
    """
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise FrameError(f"{len(frames)} frames, expected 1 to {MAX_FRAMES}")
    header = _read_header(frames[0], plane)
    message_type = _message_type(header["t"], plane)
    _check_header_size(len(frames[0]), message_type)
    try:
        message: Message = _CODERS[message_type].load(header["b"])
    except MessageError as error:
        raise error.inside(message_type.__name__) from None
    tensors = _attach(header["x"], frames[1:])
    _check_tensors(message, tensors)
    return message, tensors


def _read_header(frame: Frame, plane: Plane | None) -> dict[str, Any]:
    limit = MAX_CLIENT_HEADER_BYTES if plane is None else plane.max_header_bytes
    if len(frame) > limit:
        raise FrameError(f"a header of {len(frame)} bytes, at most {limit} are allowed")
    header = _unpack(frame)
    if type(header) is not dict or header.get("p") != PROTOCOL_WORD:
        raise FrameError(f'the header is not a map with "p" = "{PROTOCOL_WORD}"')
    version = header.get("v")
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise VersionError(
            f"the peer speaks protocol version {version!r:.20}, this program version {PROTOCOL_VERSION}: "
            "install the same glmpipe release on both sides"
        )
    if header.keys() != HEADER_KEYS:
        raise FrameError(f"the header's keys are not {', '.join(sorted(HEADER_KEYS))}")
    return header


def _unpack(frame: Frame) -> Any:
    hooks = {"object_pairs_hook": _unique_keys} if len(frame) <= SMALL_HEADER_BYTES else _counting_hooks()
    try:
        return msgpack.unpackb(frame, **hooks, max_map_len=MAX_MAP_KEYS, max_bin_len=0, max_ext_len=0)
    except FrameError:
        raise
    except Exception as error:  # whatever the parser makes of hostile bytes, the fault is the sender's
        raise FrameError(f"the header is not msgpack: {type(error).__name__} {error!s:.80}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise FrameError("a map in the header has a key twice")
    return unique


def _counting_hooks() -> dict[str, Any]:
    """Hooks that stop a large header made of tiny containers, which would take 60 times its size in memory."""
    count = 0

    def counted(value: Any) -> Any:
        nonlocal count
        count += 1
        if count > MAX_CONTAINERS:
            raise FrameError(f"more than {MAX_CONTAINERS} maps and arrays in one header")
        return value

    return {"object_pairs_hook": lambda pairs: _unique_keys(counted(pairs)), "list_hook": counted}


def _message_type(name: Any, plane: Plane | None) -> type[Message]:
    message_type = _TYPES.get(name) if type(name) is str else None
    if message_type is None:
        raise MessageError(f"{name!r:.40} is no message type")
    if plane is not None and MESSAGE_PLANES[message_type] is not plane:
        raise MessageError(f"a {name} message does not belong on the {plane.value} plane")
    return message_type


def _check_header_size(num_bytes: int, message_type: type[Message]) -> None:
    if num_bytes > _MAX_HEADER_BYTES[message_type]:
        raise FrameError(
            f"a {message_type.__name__} header of {num_bytes} bytes, "
            f"at most {_MAX_HEADER_BYTES[message_type]} are allowed"
        )


def _attach(descriptors: Any, buffers: Sequence[Frame]) -> tuple[RawTensor, ...]:
    if type(descriptors) is not list or len(descriptors) > MAX_TENSORS:
        raise TensorError(f'"x" is not a list of at most {MAX_TENSORS} descriptors')
    if len(descriptors) != len(buffers):
        raise TensorError(f"{len(descriptors)} tensors described, {len(buffers)} received")
    return tuple(map(_raw_tensor, descriptors, buffers))


def _raw_tensor(descriptor: Any, buffer: Frame) -> RawTensor:
    if type(descriptor) is not list or len(descriptor) != 2 or type(descriptor[1]) is not list:
        raise TensorError("a descriptor is not a pair of dtype and dimensions")
    return RawTensor(descriptor[0], tuple(descriptor[1]), buffer)


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
