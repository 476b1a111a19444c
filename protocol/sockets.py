"""ZeroMQ sockets as the contract wants them: bounded queues and message sizes, and keys where other hosts can reach."""

import errno
from collections.abc import Sequence

import zmq

from protocol.descriptors import PASSING, descriptor_limit
from protocol.endpoints import checked_endpoint, checked_own_address, is_local, needs_ipv6
from protocol.errors import DescriptorError, EndpointError
from protocol.flood_guard import Inflow
from protocol.limits import MAX_CLIENT_HEADER_BYTES, MAX_DATA_HEADER_BYTES, MAX_INSPECTED_BYTES, MAX_STEP_BYTES
from protocol.messages import Message
from protocol.security import sender_key
from protocol.tensors import RawTensor
from protocol.wire import encode

Socket = zmq.Socket[bytes]
_BIND_REMEDIES = {
    errno.EADDRINUSE: "; another program has it: name another port, or end that one",
    errno.EADDRNOTAVAIL: "; this host has no such address",
    errno.ENODEV: "; this host has no such address",
}

CONTROL_QUEUE = 1000
"""Messages waiting for a peer on the control and client planes; one that falls so far behind is lost anyway."""
CONTROL_RECEIVE_QUEUE = 16
"""Messages of one peer that wait here: the rest waits with the peer, whose memory they may fill."""
DATA_QUEUE = 64
"""Steps waiting per hop: each may carry a whole prompt's hidden states, so backpressure must reach the coordinator."""
CONTROL_LINGER_MS = 500
"""How long closing a control socket waits for a goodbye to leave; a data socket drops what nobody took."""

HEARTBEAT_MS = 2000
SILENT_MS = 10_000
"""A connection over TCP that has been silent for so long, although ZeroMQ's own heartbeats went out, is closed."""
HANDSHAKE_MS = 2000
"""Whoever has not shaken hands after so long is disconnected: strangers that say nothing, and clients refused for now,
whose connection ZeroMQ does not always close at once."""
UNACKED_MS = 5000
"""A connection over TCP whose peer's host has acknowledged nothing of what was sent for so long is closed. ZeroMQ's
heartbeats see to it that there is always something to acknowledge, on both sides."""
RECONNECT_MAX_MS = 2000
"""Trying to connect again begins after 0.1 s and doubles up to this."""
CONNECT_MS = 3000
"""An attempt to connect is given up after so long, and another one made: the system's own retries grow to minutes."""
_MORE = int(zmq.SNDMORE)  # joining flags as enum members takes longer than sending does
_HANDSHAKE_BYTES = 2**12
"""More than any command has by which a connection begins."""
_ENVELOPE_BYTES = 64
"""What encryption adds to a frame, and more."""


def control_socket(context: "zmq.Context[Socket]", kind: int) -> Socket:
    """A ROUTER or DEALER for the control plane."""
    return _talking_socket(context, kind, MAX_INSPECTED_BYTES)


def client_socket(context: "zmq.Context[Socket]", kind: int) -> Socket:
    """A ROUTER or DEALER for the client plane."""
    return _talking_socket(context, kind, MAX_CLIENT_HEADER_BYTES)


def data_socket(context: "zmq.Context[Socket]", kind: int) -> Socket:
    """A PUSH or PULL for the data plane. A PUSH queues only for a peer that is there (IMMEDIATE), and reads nothing."""
    socket = _socket(context, kind, DATA_QUEUE, _HANDSHAKE_BYTES if kind == zmq.PUSH else MAX_STEP_BYTES)
    if kind == zmq.PUSH:
        socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    return socket


def control_inflow_bytes() -> int:
    """How much may wait at a control socket, of all peers: as much as its queue has of the largest from one."""
    return CONTROL_RECEIVE_QUEUE * MAX_INSPECTED_BYTES


def data_inflow_bytes(num_stages: int) -> int:
    """How much may wait at a data socket: all steps that a chain of so many stages has on their way, and one more."""
    return min(num_stages + 2, DATA_QUEUE) * (MAX_STEP_BYTES + MAX_DATA_HEADER_BYTES)


def bind(socket: Socket, endpoint: str) -> str:
    """Bind, with keys where others can reach it; returns the endpoint to connect to (with the port chosen for `*`).

    Raises:
        EndpointError: the address cannot be bound, or is no file, not on loopback, and the socket has no keys
            (see `security.Gatekeeper.guard`).
    """
    checked = checked_own_address(endpoint)
    _check_keys(socket, checked, "bound")
    _prepare(socket, checked)
    try:
        socket.bind(checked)
    except zmq.ZMQError as error:
        raise EndpointError(
            f"cannot bind {checked}: {_words(error)}{_BIND_REMEDIES.get(error.errno or 0, '')}"
        ) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: Socket, endpoint: str) -> None:
    """Connect; ZeroMQ goes on trying until somebody listens.

    Raises:
        EndpointError: another host's address, and the socket has no keys (see `security.be_client`).
    """
    checked = checked_endpoint(endpoint)
    _check_keys(socket, checked, "connected")
    _prepare(socket, checked)
    try:
        socket.connect(checked)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot connect {checked}: {_words(error)}") from None


def _words(error: zmq.ZMQError) -> str:
    """The system's, or ZeroMQ's own, without what pyzmq adds to them."""
    return zmq.strerror(error.errno) if error.errno else str(error)


def send(socket: Socket, message: Message, tensors: Sequence[RawTensor] = (), flags: int = 0) -> None:
    """Encode and send; large tensor buffers are not copied and must not change afterwards. zmq.Again if full."""
    send_frames(socket, encode(message, tensors), flags)


def send_frames(socket: Socket, message: Sequence[bytes | memoryview], flags: int = 0) -> None:
    """Send what `encode` or `encode_valid` made. zmq.Again if full."""
    *frames, last = message
    for frame in frames:
        socket.send(frame, int(flags) | _MORE, copy=False)
    socket.send(last, flags, copy=False)


def receive(socket: Socket, flags: int = 0) -> list[memoryview]:
    """The frames of the next message, uncopied; each view keeps its buffer alive."""
    frame = socket.recv(flags, copy=False)
    frames = [frame.buffer]
    while frame.more:
        frame = socket.recv(flags, copy=False)
        frames.append(frame.buffer)
    return frames


def receive_from(socket: Socket, inflow: Inflow, flags: int = 0) -> tuple[str, list[memoryview]]:
    """As `receive`, with the public key that the sender has proved to own; empty for one of this process.

    `inflow` is that of the socket, which has keys.
    """
    frames = socket.recv_multipart(flags=flags, copy=False)
    inflow.note(frames)
    return sender_key(frames[0]), [frame.buffer for frame in frames]


def _check_keys(socket: Socket, checked: str, what: str) -> None:
    if not is_local(checked) and socket.getsockopt(zmq.MECHANISM) != zmq.CURVE:
        raise EndpointError(
            f"{checked} is not this host's loopback interface, and nothing is {what} to other hosts without keys: "
            "make them with `glmpipe keys new` (and name them, see `glmpipe worker --help`), or use "
            "tcp://127.0.0.1:PORT (also 127.x.y.z, localhost, [::1]) or ipc:///path/to/socket"
        )


def _prepare(socket: Socket, checked: str) -> None:
    """Between hosts, cables drop and machines sleep without a word: let ZeroMQ notice, and come back by itself."""
    socket.setsockopt(zmq.IPV6, int(needs_ipv6(checked)))
    if checked.startswith("tcp://"):
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.TCP_MAXRT, UNACKED_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)


def _talking_socket(context: "zmq.Context[Socket]", kind: int, max_frame_bytes: int) -> Socket:
    socket = _socket(context, kind, CONTROL_QUEUE, max_frame_bytes)
    socket.setsockopt(zmq.RCVHWM, CONTROL_RECEIVE_QUEUE)
    socket.setsockopt(zmq.LINGER, CONTROL_LINGER_MS)
    return socket


def _socket(context: "zmq.Context[Socket]", kind: int, queue: int, max_frame_bytes: int) -> Socket:
    """Whoever sends a larger frame is disconnected before it is read, and before keys are looked at.

    Raises DescriptorError.
    """
    try:
        socket = context.socket(kind)
    except zmq.ZMQError as error:
        if error.errno not in PASSING:
            raise
        raise DescriptorError(
            f"no socket can be made just now: {_words(error)} ({descriptor_limit()} descriptors are allowed: `ulimit "
            "-n`, or LimitNOFILE= of a service, grants more)"
        ) from None
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes + _ENVELOPE_BYTES)
    return socket
