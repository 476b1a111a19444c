"""What a socket takes: all that its plane has to say, and not a byte of what is larger."""

import contextlib
import errno
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from protocol import sockets
from protocol.client import Generate, TokenPrompt
from protocol.control import Inspected
from protocol.data import Span, Step
from protocol.limits import MAX_CLIENT_HEADER_BYTES, MAX_INSPECTED_BYTES, MAX_STEP_BYTES
from protocol.messages import Message
from protocol.security import Gatekeeper, be_client, new_key_pair
from protocol.sockets import Socket, bind, client_socket, connect, control_socket, data_socket, receive, send
from protocol.tensors import RawTensor
from protocol.wire import decode

SocketMaker = Callable[["zmq.Context[Socket]", int], Socket]
PLANES = [
    pytest.param(control_socket, zmq.ROUTER, MAX_INSPECTED_BYTES, id="control"),
    pytest.param(client_socket, zmq.ROUTER, MAX_CLIENT_HEADER_BYTES, id="client"),
    pytest.param(data_socket, zmq.PULL, MAX_STEP_BYTES, id="data"),
]
LARGEST: list[tuple[SocketMaker, Message, tuple[()] | tuple[tuple[int, ...], int]]] = [
    (control_socket, Inspected(1, 1, 1, 0, "key", 0, 9), ((2**20,), MAX_INSPECTED_BYTES)),
    (client_socket, Generate(1, TokenPrompt(tuple(range(2**20 - 1, -1, -1))), None), ()),
    (data_socket, Step(1, 1, (), (Span(1, 0, 4096, None, None),), ()), ((4096, 4096), MAX_STEP_BYTES)),
]
PIECE_BYTES = 2**18
FLAT_BYTES = 2**24


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def greeting(mechanism: bytes) -> bytes:
    """How a ZeroMQ connection begins: the mechanism's name in 20 bytes, whether this is the server, zeros."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def get_rid_of(peer: socket.socket, num_bytes: int) -> int:
    """Send so many bytes, or as many as the other side takes before it hangs up; how many those are."""
    num_sent = 0
    with contextlib.suppress(ConnectionError):
        while num_sent < num_bytes:
            num_sent += peer.send(b"x" * PIECE_BYTES)
    return num_sent


@pytest.mark.parametrize(("make", "kind", "most"), PLANES)
@pytest.mark.parametrize("claimed", [1, 2**30, 2**62], ids=["a byte too large", "a gigabyte", "all there is"])
def test_a_frame_beyond_the_plane_is_not_read(
    context: "zmq.Context[Socket]", tmp_path: Path, make: SocketMaker, kind: int, most: int, claimed: int
) -> None:
    """Whoever announces one is disconnected at once: it costs no memory, however large it claims to be."""
    with make(context, kind) as server, socket.socket(socket.AF_UNIX) as peer:
        bind(server, f"ipc://{tmp_path}/socket")
        peer.settimeout(60)
        peer.connect(str(tmp_path / "socket"))
        type_ = b"PUSH" if kind == zmq.PULL else b"DEALER"
        ready = b"\x05READY\x0bSocket-Type" + len(type_).to_bytes(4, "big") + type_
        peer.sendall(greeting(b"NULL") + b"\x04" + bytes([len(ready)]) + ready)
        before = resident_bytes()
        peer.sendall(b"\x02" + (most + 64 + claimed).to_bytes(8, "big"))
        assert get_rid_of(peer, 2**28) < 2**24
        assert resident_bytes() - before < FLAT_BYTES
        assert not server.poll(0)


@pytest.mark.parametrize(("make", "kind", "most"), PLANES)
def test_a_stranger_cannot_announce_more_either(
    context: "zmq.Context[Socket]", make: SocketMaker, kind: int, most: int
) -> None:
    """Before any key was looked at, as the very first command of a connection: nothing is read of it."""
    with Gatekeeper(context) as gatekeeper, make(context, kind) as server, socket.socket() as peer:
        gatekeeper.guard(server, new_key_pair(), "data", lambda _key: True)
        host, _, port = bind(server, "tcp://127.0.0.1:*").removeprefix("tcp://").partition(":")
        peer.settimeout(60)
        peer.connect((host, int(port)))
        before = resident_bytes()
        peer.sendall(greeting(b"CURVE") + b"\x06" + (most + 65).to_bytes(8, "big"))
        assert get_rid_of(peer, 2**28) < 2**24
        assert resident_bytes() - before < FLAT_BYTES


@pytest.mark.parametrize(("make", "message", "tensor"), LARGEST, ids=["control", "client", "data"])
@pytest.mark.parametrize("is_guarded", [False, True], ids=["in the open", "encrypted"])
def test_the_largest_message_of_a_plane_passes(  # type: ignore[no-untyped-def]
    context: "zmq.Context[Socket]", make: SocketMaker, message: Message, tensor, is_guarded: bool
) -> None:
    """A prompt of a million tokens, the largest piece of an inspection, the largest step, whatever encryption adds."""
    own, others = new_key_pair(), new_key_pair()
    tensors = (RawTensor("float32", tensor[0], bytes(tensor[1])),) if tensor else ()
    with Gatekeeper(context) as gatekeeper, make(context, zmq.PULL) as server, make(context, zmq.PUSH) as peer:
        if is_guarded:
            gatekeeper.guard(server, own, "data", lambda _key: True)
            be_client(peer, others, own.public)
        connect(peer, bind(server, "tcp://127.0.0.1:*"))
        send(peer, message, tensors)
        assert server.poll(60_000), "it did not come"
        assert decode(receive(server)) == (message, tensors)


def test_what_a_peer_may_leave_unread_is_bounded(context: "zmq.Context[Socket]", tmp_path: Path) -> None:
    """A launch that is busy holds so many of a client's messages, and the client has to keep the others."""
    with client_socket(context, zmq.ROUTER) as server, client_socket(context, zmq.DEALER) as peer:
        peer.sndhwm = 1
        peer.linger = 0
        connect(peer, bind(server, f"ipc://{tmp_path}/socket"))
        num_sent = 0
        with contextlib.suppress(zmq.Again):
            for _ in range(200):
                peer.sndtimeo = 300
                peer.send(bytes(2**20))
                num_sent += 1
        assert num_sent < 40


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EADDRINUSE, "Address already in use"), (zmq.ENOCOMPATPROTO, "not compatible"), (zmq.ETERM, "terminated")],
)
def test_errors_are_told_in_words(number: int, words: str) -> None:
    """ZeroMQ has numbers of its own, which the system knows nothing of; what pyzmq adds to the words is left out."""
    told = sockets._words(zmq.ZMQError(number, "what pyzmq adds"))
    assert words in told and "pyzmq" not in told
