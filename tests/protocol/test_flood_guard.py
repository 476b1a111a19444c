"""What comes in and is not taken is bounded, whoever sends it and however it is cut into frames."""

import os
import queue
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from protocol import connections, flood_guard
from protocol.connections import HEARTBEAT_BYTES_PER_S, IS_SUPPORTED
from protocol.flood_guard import (
    BENCH_S,
    CROWDED_LOOK_S,
    FEW_LOOK_S,
    LOOK_S,
    STRANGER_S,
    Flood,
    FloodGuard,
    Inflow,
    surplus,
)
from protocol.security import Gatekeeper, KeyPair, be_client, new_key_pair
from protocol.sockets import Socket, bind, connect, data_socket, receive_from

pytestmark = pytest.mark.skipif(not IS_SUPPORTED, reason="this system does not count what comes by a connection")

LIMIT_BYTES = 2**20
SERVER, FRIEND, FOE = new_key_pair(), new_key_pair(), new_key_pair()
DEADLINE_MS = 60_000


class Door:
    """A listening TCP socket under a flood guard, with a clock of its own; messages are but bytes here."""

    def __init__(self) -> None:
        self.floods: list[Flood] = []
        self.now_s = 0.0
        self.inflow = Inflow(1000)
        self.guard = FloodGuard(self.floods.append, lambda: self.now_s)
        self.guard.watch("data", self.inflow)
        self._stack = ExitStack()
        self._listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.inflow.listens_at(f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")

    def let_in(self, address: str = "127.0.0.1", key: str = "key") -> tuple[socket.socket, socket.socket]:
        """Both ends of a new connection."""
        peer = self.dial(address)
        return self.accept(address, key), peer

    def dial(self, address: str, timeout_s: float | None = None) -> socket.socket:
        peer = self._stack.enter_context(socket.socket())
        peer.settimeout(timeout_s)
        peer.bind((address, 0))
        peer.connect(self._listener.getsockname())
        return peer

    def accept(self, address: str, key: str) -> socket.socket:
        own = self.accept_quietly()
        self.guard.let_in("data", address, key)
        return own

    def accept_quietly(self) -> socket.socket:
        """Of somebody who shows no key."""
        return self._stack.enter_context(self._listener.accept()[0])

    def look(self, after_s: float = 2 * LOOK_S) -> None:
        self.now_s += after_s
        self.guard.look()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def come(own: socket.socket, peer: socket.socket, num_bytes: int) -> None:
    """Send so many, and see them there."""
    peer.sendall(bytes(num_bytes))
    while num_bytes:
        num_bytes -= len(own.recv(num_bytes))


def is_ended(peer: socket.socket) -> bool:
    peer.settimeout(0)
    try:
        return peer.recv(1) == b""
    except BlockingIOError:
        return False


def test_what_is_not_taken_is_bounded(door: Door) -> None:
    """Up to the limit it may wait; a byte more, and the connection is ended and its owner kept out for a while."""
    own, peer = door.let_in(key="foe")
    come(own, peer, 1000)
    door.look()
    assert not door.floods and not is_ended(peer)
    come(own, peer, 100)
    door.look()
    assert [(f.domain, f.address, f.keys) for f in door.floods] == [("data", "127.0.0.1", ("foe",))]
    assert 1000 < door.floods[0].held_bytes <= 1100 and is_ended(peer)
    assert door.guard.refuses("data", "127.0.0.9", "foe") and door.guard.refuses("data", "127.0.0.1", "other")
    assert not door.guard.refuses("data", "127.0.0.9", "other") and not door.guard.refuses(
        "control", "127.0.0.1", "foe"
    )
    door.look(BENCH_S)
    assert not door.guard.refuses("data", "127.0.0.1", "foe")
    assert door.guard.num_connections == 0


def test_what_is_taken_counts_no_more_and_earns_nothing(door: Door) -> None:
    """Any amount may pass through; whoever once had more taken than came has no credit for that."""
    own, peer = door.let_in()
    for _ in range(20):
        come(own, peer, 900)
        door.look()
        door.inflow.taken_bytes[own.fileno()] = door.inflow.taken_bytes.get(own.fileno(), 0) + 1500
        door.look()
    assert not door.floods
    come(own, peer, 1100)
    door.look()
    assert len(door.floods) == 1


def test_heartbeats_are_no_flood(door: Door) -> None:
    """A day of what connections carry beside messages."""
    own, peer = door.let_in()
    for _ in range(24 * 60):
        come(own, peer, int(HEARTBEAT_BYTES_PER_S))
        door.look(1.0)
        door.look(59.0)
    assert not door.floods and not is_ended(peer)


def test_all_connections_count_together_and_the_host_that_holds_most_goes(door: Door) -> None:
    """Ten small floods are one large one; a neighbour with the largest message of all stays."""
    neighbour = door.let_in()
    come(*neighbour, 290)
    others = [door.let_in("127.0.0.2", f"key-{number}") for number in range(10)]
    for other in others:
        come(*other, 100)
    door.look()
    assert {flood.address for flood in door.floods} == {"127.0.0.2"}
    assert 3 <= sum(is_ended(peer) for _, peer in others) == len(door.floods) < 10
    assert not is_ended(neighbour[1])


def test_a_descriptor_that_stands_for_another_connection_starts_anew(door: Door) -> None:
    """What was taken from the one before it neither counts for it nor against it, and nobody else's socket is ended."""
    own, peer = door.let_in()
    come(own, peer, 900)
    door.inflow.taken_bytes[own.fileno()] = 900
    door.look()
    fd, peer = own.fileno(), door.dial("127.0.0.1")
    own.close()
    own = door.accept("127.0.0.1", "key")
    assert own.fileno() == fd
    come(own, peer, 900)
    door.look()
    assert not door.floods
    peer.sendall(bytes(200))
    assert own.recv(200, socket.MSG_WAITALL)
    own.close()
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert other.fileno() == fd
        door.look()
        assert not door.floods and other.getsockname()
    assert door.guard.num_connections == 0


class Plane:
    """A PULL with keys, bounded, and those who push at it."""

    def __init__(self, context: "zmq.Context[Socket]") -> None:
        self.floods: queue.SimpleQueue[Flood] = queue.SimpleQueue()
        self.stack = ExitStack()
        self.inflow = Inflow(LIMIT_BYTES)
        self._context = context
        gatekeeper = self.stack.enter_context(Gatekeeper(context, self.floods.put))
        self.pull = self.stack.enter_context(data_socket(context, zmq.PULL))
        gatekeeper.guard(self.pull, SERVER, "data", lambda _: True, may_retry=True, inflow=self.inflow)
        self.endpoint = bind(self.pull, "tcp://127.0.0.1:*")
        self.inflow.listens_at(self.endpoint)

    def peer(self, keys: KeyPair) -> Socket:
        push = self.stack.enter_context(data_socket(self._context, zmq.PUSH))
        be_client(push, keys, SERVER.public)
        connect(push, self.endpoint)
        assert push.poll(DEADLINE_MS, zmq.POLLOUT)
        return push

    def take(self) -> tuple[str, list[bytes]]:
        assert self.pull.poll(DEADLINE_MS)
        sender, frames = receive_from(self.pull, self.inflow)
        return sender, [bytes(frame) for frame in frames]


@pytest.fixture
def plane(context: "zmq.Context[Socket]") -> Iterator[Plane]:
    plane = Plane(context)
    with plane.stack:
        yield plane


def send_endless(push: Socket, frame_bytes: int) -> None:
    """As good as endless: a message that would fill the memory. Its frames are all the same one: the sender's stays."""
    frame = zmq.Frame(bytes(frame_bytes))
    for _ in range(2**20):
        push.send(frame, zmq.SNDMORE, copy=False)
    push.send(b"the end")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("frame_bytes", [2**12, 2**16, 2**20])
def test_a_message_without_end_ends_its_connection_alone(plane: Plane, frame_bytes: int) -> None:
    """A message of four gigabytes or more begins to come: memory stays, every message of another peer arrives."""
    friend, foe = plane.peer(FRIEND), plane.peer(FOE)
    friend.send_multipart([b"before", bytes(2**16)])
    assert plane.take() == (FRIEND.public, [b"before", bytes(2**16)])
    before = resident_bytes()
    send_endless(foe, frame_bytes)
    flood = None
    for number in range(10**6):
        friend.send(b"%d" % number)
        assert plane.take() == (FRIEND.public, [b"%d" % number])
        if not plane.floods.empty():
            flood = plane.floods.get()
            break
    assert flood is not None and flood.held_bytes > LIMIT_BYTES
    assert (flood.domain, flood.address, set(flood.keys)) == ("data", "127.0.0.1", {FRIEND.public, FOE.public})
    friend.send(b"after")
    assert plane.take() == (FRIEND.public, [b"after"])
    assert resident_bytes() - before < 2**30


def test_who_is_only_sent_to_cannot_send_back_without_end(context: "zmq.Context[Socket]") -> None:
    """A next hop that answers, though a PUSH never reads: its connection is ended, again and again."""
    floods: queue.SimpleQueue[Flood] = queue.SimpleQueue()
    ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PULL"
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    with (
        Gatekeeper(context, floods.put) as gatekeeper,
        data_socket(context, zmq.PUSH) as push,
        socket.create_server(("127.0.0.1", 0)) as hostile,
    ):
        hostile.settimeout(DEADLINE_MS / 1000)
        endpoint = f"tcp://127.0.0.1:{hostile.getsockname()[1]}"
        gatekeeper.expect_nothing("next").leads_to(endpoint)
        connect(push, endpoint)
        for _ in range(2):
            with hostile.accept()[0] as peer, pytest.raises(ConnectionError):
                peer.settimeout(DEADLINE_MS / 1000)
                peer.sendall(greeting + b"\x04" + bytes([len(ready)]) + ready)
                heard = b""
                while b"PUSH" not in heard:
                    heard += peer.recv(100)
                while True:
                    peer.sendall((b"\x01\x40" + bytes(64)) * 1000)
            flood = floods.get(timeout=DEADLINE_MS / 1000)
            assert (flood.domain, flood.address) == ("next", "127.0.0.1") and flood.held_bytes > 2**20


def test_whole_messages_of_all_sizes_are_no_flood(plane: Plane) -> None:
    """Not a byte is missed: many times the limit comes, and is taken."""
    friend = plane.peer(FRIEND)
    plane.inflow.limit_bytes = 2**14
    for number in range(20_000):
        frames = [bytes(number % 600)] * (1 + number % 3)
        friend.send_multipart(frames)
        assert plane.take() == (FRIEND.public, frames)
    assert plane.floods.empty()


def test_what_this_process_sends_itself_is_not_counted() -> None:
    """A message without a connection."""
    inflow = Inflow(1)
    inflow.note([zmq.Frame(b"wake")])
    assert inflow.taken_bytes == {}


@pytest.mark.parametrize(
    ("crowds", "most", "gone"),
    [
        ({}, 3, {}),
        ({"a": 2, "b": 1}, 3, {}),
        ({"a": 9, "b": 1}, 5, {"a": 5}),
        ({"a": 9, "b": 7, "c": 1}, 9, {"a": 5, "b": 3}),
        ({"a": 3, "b": 3}, 5, {"a": 1, "b": 1}),
        ({"a": 5}, 0, {"a": 5}),
    ],
)
def test_the_largest_crowds_are_cut_down(crowds: dict[str, int], most: int, gone: dict[str, int]) -> None:
    """Until no more than the most are left; a small one loses nothing beside a large one."""
    assert surplus(crowds, most) == gone


def test_strangers_beyond_their_number_go_the_oldest_first(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has said something, who has been there for long, and a quieter host's own stay."""
    monkeypatch.setattr(flood_guard, "MOST_STRANGERS", 6)
    old = door.let_in("127.0.0.3", "friend")
    door.look(STRANGER_S + 1.0)
    heard = door.let_in("127.0.0.2", "friend")
    door.inflow.taken_bytes[heard[0].fileno()] = 100
    quiet = door.let_in("127.0.0.4", "new")
    door.guard.let_in = lambda *_: None  # type: ignore[method-assign]
    crowd = []
    for _ in range(20):
        crowd.append(door.let_in("127.0.0.2"))
        door.look(0.01)
        for own, _ in (ended for ended in crowd if is_ended(ended[1])):
            own.close()  # as ZeroMQ does
    assert [is_ended(peer) for _, peer in crowd] == [True] * 15 + [False] * 5
    assert not any(is_ended(peer) for _, peer in (old, heard, quiet))
    assert {(f.address, f.held_bytes, f.num_strangers) for f in door.floods} == {("127.0.0.2", 0, 1)}
    assert door.guard.pause_s == CROWDED_LOOK_S


def test_nobody_comes_in_while_few_descriptors_are_left(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers beyond their number shut the door before the last descriptor is gone, until they are; then it opens."""
    num_open = connections.num_open()
    monkeypatch.setattr(flood_guard, "descriptor_limit", lambda: 4 * num_open)
    monkeypatch.setattr(flood_guard, "MOST_STRANGERS", 2)
    assert door.guard.pause_s == FEW_LOOK_S
    door.look(0.01)
    crowd = [(door.dial("127.0.0.2"), door.accept_quietly()) for _ in range(2 * num_open)]
    door.look(0.01)
    with pytest.raises(TimeoutError):
        door.dial("127.0.0.3", timeout_s=0.2)
    for stranger, own in crowd:
        stranger.close()
        own.close()
    door.look(0.01)
    door.dial("127.0.0.3", timeout_s=10.0)


def test_nobody_holds_more_connections_than_a_host_needs(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is let in: the next one is refused for now, another host's is not."""
    monkeypatch.setattr(flood_guard, "MOST_OF_ONE_ADDRESS", 3)
    for _ in range(3):
        door.let_in("127.0.0.2", "friend")
    door.look(STRANGER_S + 1.0)
    assert door.guard.refuses("data", "127.0.0.2", "friend") and not door.guard.refuses("data", "127.0.0.3", "other")
