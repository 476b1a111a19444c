"""A peer that got through to the sockets and means harm.

    python -m tests.end_to_end.attacker SEED NUM PLANE=ENDPOINT ...

Says, as JSON on one line, how many messages it got rid of, how many connections it made.
"""

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from functools import cache
from random import Random

import msgpack
import zmq

from fuzz.frames import FRAMES, split
from protocol import client
from protocol.control import Failed, Join, Leaving, Pong, Ready
from protocol.data import DropSequence, Span, Step, StepFailed
from protocol.endpoints import ipc_path
from protocol.messages import Plane
from protocol.records import with_changes
from protocol.sockets import connect, control_socket, data_socket
from protocol.tensors import RawTensor
from protocol.version import PROTOCOL_VERSION, VERSION
from protocol.wire import Frame, decode, encode

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)
"""How a ZeroMQ connection begins; what follows is ours to spoil."""
CURVE = GREETING.replace(b"NULL\0", b"CURVE")
"""The same of a connection with keys; what should follow is a handshake."""
HIDDEN_SIZE = 32
ACTIVE_EPOCH = 1


def main() -> int:
    """Attack all endpoints in turn."""
    seed, num_messages = int(sys.argv[1]), int(sys.argv[2])
    targets = [argument.split("=", 1) for argument in sys.argv[3:]]
    rng, context, num_sent, num_connections = Random(seed), zmq.Context(), 0, 0
    for number in range(num_messages):
        plane, endpoint = targets[number % len(targets)]
        if number % 200 < len(targets):
            num_connections += strangers(endpoint, rng, 25)
        with (
            hostile_socket(context, Plane(plane), endpoint)
            if number % 50 < len(targets)
            else kept(context, Plane(plane), endpoint) as peer
        ):
            num_sent += sum(say(peer, frames) for frames in messages(Plane(plane), rng))
    for peer in _kept.values():
        peer.close(linger=0)
    context.destroy(linger=0)
    print(json.dumps({"sent": num_sent, "connections": num_connections}))
    return 0


_kept: dict[str, "zmq.Socket[bytes]"] = {}


@contextlib.contextmanager
def kept(context: "zmq.Context[zmq.Socket[bytes]]", plane: Plane, endpoint: str) -> Iterator["zmq.Socket[bytes]"]:
    """A connection that lasts: replies pile up in it unread."""
    if endpoint not in _kept:
        _kept[endpoint] = _connected(context, plane, endpoint)
    yield _kept[endpoint]


@contextlib.contextmanager
def hostile_socket(
    context: "zmq.Context[zmq.Socket[bytes]]", plane: Plane, endpoint: str
) -> Iterator["zmq.Socket[bytes]"]:
    """A connection that ends in the middle of a message."""
    with _connected(context, plane, endpoint) as peer:
        yield peer
        with contextlib.suppress(zmq.Again):
            peer.send(b"half of it", zmq.SNDMORE)
        peer.linger = 0


def _connected(context: "zmq.Context[zmq.Socket[bytes]]", plane: Plane, endpoint: str) -> "zmq.Socket[bytes]":
    peer = data_socket(context, zmq.PUSH) if plane is Plane.DATA else control_socket(context, zmq.DEALER)
    peer.sndtimeo = 500
    connect(peer, endpoint)
    return peer


def say(peer: "zmq.Socket[bytes]", frames: list[Frame]) -> int:
    """1 if it left."""
    with contextlib.suppress(zmq.Again):
        peer.send_multipart(frames)
        return 1
    return 0


@cache
def _seeds() -> list[bytes]:
    return list(FRAMES.seeds())


def messages(plane: Plane, rng: Random) -> Iterator[list[Frame]]:
    """A spoiled message, a valid one of any plane, and one that means something here."""
    seeds = _seeds()
    yield list(split(FRAMES.mutate(rng.choice(seeds), rng.choice(seeds), rng))) or [b""]
    valid = rng.choice([seed for seed in seeds if plane is not Plane.CLIENT or b"Generate" not in seed])
    if plane is not Plane.DATA or _epoch(valid) != ACTIVE_EPOCH:
        yield list(split(valid))
    yield rng.choice(list(meant(plane, rng)))
    yield rng.choice(list(skewed()))
    yield rng.choice(([b"x" * 2**21], [b"\xdc\xff\xff" + b"\x80" * 65535, b"y"], [b""] * 200, [rng.randbytes(300)]))


def _epoch(data: bytes) -> int:
    message, _ = decode(split(data))
    return getattr(message, "epoch", 0)


def meant(plane: Plane, rng: Random) -> Iterator[list[Frame]]:
    """What would do harm if it were believed."""
    number = rng.randrange(1, 2000)
    if plane is Plane.CONTROL:
        nowhere = "ipc:///tmp/nowhere"
        join = Join(1, "stage-1", VERSION, "2", "host", 1, "cpu", "cpu", 1, 1, 1, (), nowhere, "", False, "token", None)
        for message in (
            join,
            with_changes(join, worker_id="somebody"),
            with_changes(join, worker_id="stage-2", glmpipe_version="0.0.1"),
            Pong(0, "idle", 1, 0.0, 0, 0, 0, 0, 0, 0, 0),
            Ready(number, 1, 1, 1, 1.0, "torch"),
            Failed(number, 1, "internal", "no"),
            Leaving(0, "bye"),
        ):
            yield encode(message)
    elif plane is Plane.DATA:
        for epoch, step_id in ((0, number), (2, number), (ACTIVE_EPOCH, 0), (ACTIVE_EPOCH, 1)):
            step = Step(epoch, step_id, (DropSequence(1),), (Span(1, 0, 2, None, None),), ())
            yield encode(step, (RawTensor("float32", (2, HIDDEN_SIZE), bytes(8 * HIDDEN_SIZE)),))
            yield encode(StepFailed(epoch, step_id, 0, "internal", "no", (DropSequence(1), DropSequence(2)), ()))
    else:
        for text in (client.Cancel(1), client.Cancel(number), client.Describe(number)):
            yield encode(text)
        for prompt in (client.TokenPrompt((10**6,)), client.TokenPrompt(()), client.TextPrompt("x")):
            yield encode(client.Generate(number, prompt, None))


def skewed() -> Iterator[list[Frame]]:
    """Other versions of the protocol."""
    for version in (0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1, 2**40):
        header = {"p": "glmpipe", "v": version, "t": "Ping", "b": {"request_id": 1}, "x": []}
        yield [msgpack.packb(header)]


def strangers(endpoint: str, rng: Random, count: int) -> int:
    """Connections that do not even speak ZeroMQ, or stop after a part of its greeting, all open at once."""
    path, (host, _, port) = ipc_path(endpoint), endpoint.removeprefix("tcp://").partition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            raw = stack.enter_context(socket.socket(socket.AF_INET if path is None else socket.AF_UNIX))
            raw.settimeout(5)
            with contextlib.suppress(OSError):
                raw.connect((host, int(port)) if path is None else str(path))
                part = GREETING[: rng.randrange(64)]
                raw.sendall(rng.choice((b"", b"GET / HTTP/1.0\r\n\r\n", part, GREETING * 3, CURVE, CURVE * 2)))
                raw.sendall(GREETING + b"\x02" + b"\xff" * 8 if rng.random() < 0.3 else rng.randbytes(100))
    return count


if __name__ == "__main__":
    sys.exit(main())
