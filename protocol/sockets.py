"""ZeroMQ sockets as the contract wants them: bounded queues and message sizes, loopback only."""

from collections.abc import Sequence

import zmq

from protocol.endpoints import checked_endpoint, needs_ipv6
from protocol.errors import EndpointError
from protocol.limits import MAX_TENSOR_BYTES
from protocol.messages import Message
from protocol.tensors import RawTensor
from protocol.wire import encode

Socket = zmq.Socket[bytes]

CONTROL_QUEUE = 1000
"""Messages waiting per peer on the control and client planes; a peer that falls so far behind is lost anyway."""
DATA_QUEUE = 64
"""Steps waiting per hop: each may carry a whole prompt's hidden states, so backpressure must reach the coordinator."""
CONTROL_LINGER_MS = 500
"""How long closing a control socket waits for a goodbye to leave; a data socket drops what nobody took."""


def control_socket(context: "zmq.Context[Socket]", kind: int) -> Socket:
    """A ROUTER or DEALER for the control or client plane."""
    return _socket(context, kind, CONTROL_QUEUE, CONTROL_LINGER_MS)


def data_socket(context: "zmq.Context[Socket]", kind: int) -> Socket:
    """A PUSH or PULL for the data plane. A PUSH queues only for a peer that is there (IMMEDIATE)."""
    socket = _socket(context, kind, DATA_QUEUE, linger_ms=0)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    return socket


def bind(socket: Socket, endpoint: str) -> str:
    """Bind after the loopback check; returns the endpoint others can connect to (with the port chosen for `*`)."""
    checked = checked_endpoint(endpoint)
    socket.setsockopt(zmq.IPV6, int(needs_ipv6(checked)))
    try:
        socket.bind(checked)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot bind {checked}: {error.strerror}") from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def connect(socket: Socket, endpoint: str) -> None:
    """Connect after the loopback check; ZeroMQ goes on trying until somebody listens."""
    checked = checked_endpoint(endpoint)
    socket.setsockopt(zmq.IPV6, int(needs_ipv6(checked)))
    try:
        socket.connect(checked)
    except zmq.ZMQError as error:
        raise EndpointError(f"cannot connect {checked}: {error.strerror}") from None


def send(socket: Socket, message: Message, tensors: Sequence[RawTensor] = (), flags: int = 0) -> None:
    """Encode and send; large tensor buffers are not copied and must not change afterwards. zmq.Again if full."""
    *frames, last = encode(message, tensors)
    for frame in frames:
        socket.send(frame, flags | zmq.SNDMORE, copy=False)
    socket.send(last, flags, copy=False)


def receive(socket: Socket, flags: int = 0) -> list[memoryview]:
    """The frames of the next message, uncopied; each view keeps its buffer alive."""
    frame = socket.recv(flags, copy=False)
    frames = [frame.buffer]
    while frame.more:
        frame = socket.recv(flags, copy=False)
        frames.append(frame.buffer)
    return frames


def _socket(context: "zmq.Context[Socket]", kind: int, queue: int, linger_ms: int) -> Socket:
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, queue)
    socket.setsockopt(zmq.RCVHWM, queue)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_TENSOR_BYTES)
    return socket
