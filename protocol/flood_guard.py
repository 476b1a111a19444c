"""Ends connections by which more has come than any peer has to say: above all messages without an end.

ZeroMQ bounds a frame, and how many whole messages wait, but it keeps every frame of a message until the last one is
there. Linux counts the bytes that have come by a TCP connection; whoever receives counts those of the messages that it
was handed. What lies between waits in this process, whole or not, and that is what is bounded here.

Connections cost descriptors, too, before anybody has shown a key: those that have not shaken hands are bounded in
number, and so are those that one host holds.

It covers sockets with keys, over TCP. Files are their own user's alone; systems that count nothing (all but Linux) are
as unprotected as ZeroMQ leaves them.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import zmq

from protocol.connections import IS_SUPPORTED, Connection, Listener, borrowed, listeners, num_open, open_sockets
from protocol.descriptors import descriptor_limit

Who = TypeVar("Who")
LOOK_S = 0.1
"""How often somebody should `look`, at least: see `FloodGuard.pause_s`."""
CROWDED_LOOK_S = 0.02
FEW_LOOK_S = 0.005
FEW_DESCRIPTORS = 8192
"""Below this limit a tenth of a second is enough for strangers to take all there are: some ten thousand a second.

Then nobody else is let in as soon as there are too many, until half of the descriptors are free again: ZeroMQ ends the
process when a local client comes and there is none left.
"""
MOST_STRANGERS = 256
"""Connections, of all hosts, that nobody knows to have shaken hands; and no more than an eighth of the descriptors."""
STRANGER_S = 3.0
"""Whoever is still connected after so long has shaken hands, or ZeroMQ would have ended it (`sockets.HANDSHAKE_MS`)."""
MOST_OF_ONE_ADDRESS = 64
MOST_CONNECTIONS = 512
"""That have shaken hands, at one socket; and no more than an eighth of the descriptors."""
BENCH_S = 10.0
"""How long whoever was put out is not let in again."""
MAX_KEYS = 16
_FRAME_BYTES = 42
"""What encryption and framing add to a frame, at most."""


class Inflow:
    """What was taken out of one socket, by connection: one that listens, or one that leads to a single peer.

    `limit_bytes` is how much of all connections may wait; it may change at any time.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.port = 0
        self.peer: tuple[str, int] | None = None
        self.taken_bytes: dict[int, int] = {}
        """Since ever, by file descriptor. Written by the receiving thread alone."""

    def listens_at(self, endpoint: str) -> None:
        """Say where the socket was bound, as soon as it is."""
        self.port = _address(endpoint)[1]

    def leads_to(self, endpoint: str) -> None:
        """Say where the socket was connected."""
        address = _address(endpoint)
        self.peer = address if address[1] else None

    def note(self, frames: Sequence[zmq.Frame]) -> None:
        """A message was received."""
        try:
            fd: Any = frames[0].get(zmq.SRCFD)
        except zmq.ZMQError:  # it comes from this process
            return
        num_bytes = _FRAME_BYTES * len(frames)
        for frame in frames:
            num_bytes += len(frame)
        taken_bytes = self.taken_bytes
        taken_bytes[fd] = taken_bytes.get(fd, 0) + num_bytes


@dataclass(frozen=True, slots=True)
class Flood:
    """A connection that was ended, with so many bytes that nobody could take.

    `domain` is the rule by which it was let in, `keys` those that its host has connected with: one of them did it.
    `num_strangers` instead: so many of that host were ended that had not shaken hands.
    """

    domain: str
    address: str
    keys: tuple[str, ...]
    held_bytes: int
    num_strangers: int = 0


class FloodGuard:
    """Knows the connections that a gatekeeper has let in, and those that were made from here.

    Belongs to the gatekeeper's thread, but for `watch`.
    """

    def __init__(self, on_flood: Callable[[Flood], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_flood = on_flood
        self._clock = clock
        self._inflows: dict[str, Inflow] = {}
        self._connections: list[Connection] = []
        self._keys: dict[tuple[str, str], list[str]] = {}
        self._benched_until_s: dict[tuple[str, str], float] = {}
        self._looked_at_s = clock()
        self._is_search_due = False
        self._is_crowded = False
        self._listeners: tuple[frozenset[int], list[Listener]] = (frozenset(), [])
        self._is_shut = False
        self._num_others = 0

    def watch(self, domain: str, inflow: Inflow) -> None:
        """Bound what comes in under this rule."""
        self._inflows[domain] = inflow

    @property
    def num_connections(self) -> int:
        """How many it knows."""
        return len(self._connections)

    @property
    def pause_s(self) -> float:
        """How long it may take until the next `look`."""
        if descriptor_limit() < FEW_DESCRIPTORS:
            return FEW_LOOK_S
        return CROWDED_LOOK_S if self._is_crowded else LOOK_S

    def refuses(self, domain: str, address: str, key: str) -> bool:
        """Whether this key or address was put out a moment ago, or that host has as many connections as it may have."""
        now_s = self._clock()
        if any(self._benched_until_s.get((domain, who), 0.0) > now_s for who in (address, key)):
            return True
        there = [c for c in self._connections if c.domain == domain and now_s - c.since_s > STRANGER_S]
        most = min(MOST_CONNECTIONS, descriptor_limit() // 8)
        return len(there) >= most or sum(c.address == address for c in there) >= MOST_OF_ONE_ADDRESS

    def let_in(self, domain: str, address: str, key: str) -> None:
        """Somebody is about to be: before its first message comes, its connection is found."""
        if IS_SUPPORTED and domain in self._inflows:
            keys = [*(known for known in self._keys.get((domain, address), []) if known != key), key]
            self._keys[domain, address] = keys[-MAX_KEYS:]
            self._is_search_due = not (self._search(is_new=True) and self._inflows[domain].port)

    def look(self) -> None:
        """End strangers beyond their number; count what waits, at most every LOOK_S, and end connections until it is
        no more than the limits."""
        now_s = self._clock()
        self._thin_out(now_s)
        passed_s = now_s - self._looked_at_s
        if passed_s < LOOK_S:
            return
        self._looked_at_s, passed_s = now_s, min(passed_s, 1.0)
        if self._must_search():
            self._is_search_due = not self._search(is_new=False)
        self._connections = [c for c in self._connections if c.count(self._taken_bytes(c), passed_s)]
        for domain, inflow in self._inflows.items():
            while (worst := self._worst(domain, inflow.limit_bytes)) is not None:
                self._put_out(worst)
        self._forget()

    def _thin_out(self, now_s: float) -> None:
        """Of the host that has most strangers here the oldest goes, until they are few."""
        limit, num_now = descriptor_limit(), num_open()
        most = min(MOST_STRANGERS, limit // 8)
        if not IS_SUPPORTED or num_now - len(self._connections) + len(self._strangers(now_s)) <= most:
            self._is_crowded = False
            self._keep_shut(False)
            return
        self._keep_shut(limit < FEW_DESCRIPTORS and (self._is_shut or num_now - self._num_others > most))
        self._search(is_new=True)
        crowds: dict[tuple[str, str], list[Connection]] = {}
        strangers = self._strangers(now_s)
        for stranger in strangers:
            crowds.setdefault((stranger.domain, stranger.address), []).append(stranger)
        self._is_crowded = len(strangers) > most
        self._num_others = num_now - len(strangers)
        for (domain, address), num_gone in surplus({who: len(crowd) for who, crowd in crowds.items()}, most).items():
            self._end_strangers(domain, address, crowds[domain, address][:num_gone])
        self._keep_shut(self._is_shut and num_open() > limit // 2)

    def _keep_shut(self, is_shut: bool) -> None:
        """Let nobody else connect, whoever it is; or everybody again."""
        if is_shut == self._is_shut:
            return
        ports = frozenset(inflow.port for inflow in self._inflows.values() if inflow.port)
        known, there = self._listeners
        if known != ports or not all(listener.keep_shut(is_shut) for listener in there):
            self._listeners = ports, listeners(ports)
            for listener in self._listeners[1]:
                listener.keep_shut(is_shut)
        self._is_shut = is_shut

    def _strangers(self, now_s: float) -> list[Connection]:
        """Connections to here, the oldest first, that are new and have said nothing yet which anybody took."""
        return [
            connection
            for connection in self._connections
            if connection.is_inbound
            and now_s - connection.since_s <= STRANGER_S
            and self._taken_bytes(connection) == connection.taken_before
        ]

    def _end_strangers(self, domain: str, address: str, gone: list[Connection]) -> None:
        left = {connection.inode for connection in gone}
        self._connections = [connection for connection in self._connections if connection.inode not in left]
        with contextlib.suppress(Exception):  # the gatekeeper must go on
            self._on_flood(Flood(domain, address, (), 0, len(gone)))
        for connection in gone:
            connection.end()

    def _must_search(self) -> bool:
        """Whether a connection may be there that is not known yet; those to here are found when they are let in."""
        found = {connection.domain for connection in self._connections}
        lacking = any(inflow.peer is not None and domain not in found for domain, inflow in self._inflows.items())
        return IS_SUPPORTED and (self._is_search_due or lacking)

    def _taken_bytes(self, connection: Connection) -> int:
        return self._inflows[connection.domain].taken_bytes.get(connection.fd, 0)

    def _search(self, *, is_new: bool) -> bool:
        """Find connections from and to where it is watched. False if that must be done again.

        What has come by one that is not new may have been taken long ago.
        """
        known = {connection.inode for connection in self._connections}
        try:
            for fd, inode in open_sockets():
                if inode not in known and (found := self._recognise(fd, inode)) is not None:
                    found.taken_before = self._taken_bytes(found)
                    if is_new or not found.is_inbound:
                        found.offset_bytes = -found.taken_before
                    self._connections.append(found)
        except OSError:  # too many open files
            return False
        return True

    def _recognise(self, fd: int, inode: int) -> Connection | None:
        with contextlib.suppress(OSError), borrowed(fd, inode) as tcp:  # one that listens has no peer
            if tcp is not None:
                port, peer = tcp.getsockname()[1], tcp.getpeername()[:2]
                for domain, inflow in self._inflows.items():
                    if port == inflow.port or peer == inflow.peer:
                        is_inbound = port == inflow.port
                        return Connection(domain, fd, inode, peer[0], self._clock(), 0, is_inbound)
        return None

    def _worst(self, domain: str, limit_bytes: int) -> Connection | None:
        """The fullest connection of the host that has most waiting here, if all have more than the limit."""
        connections = sorted((c for c in self._connections if c.domain == domain), key=lambda c: c.address)
        if sum(connection.held_bytes for connection in connections) <= limit_bytes:
            return None
        hosts = [list(group) for _, group in groupby(connections, key=lambda c: c.address)]
        fullest = max(hosts, key=lambda group: sum(connection.held_bytes for connection in group))
        return max(fullest, key=lambda connection: connection.held_bytes)

    def _put_out(self, connection: Connection) -> None:
        self._connections.remove(connection)
        keys = tuple(self._keys.get((connection.domain, connection.address), ()))
        for who in (connection.address, *keys):
            self._benched_until_s[connection.domain, who] = self._clock() + BENCH_S
        with contextlib.suppress(Exception):  # the gatekeeper must go on
            self._on_flood(Flood(connection.domain, connection.address, keys, int(connection.held_bytes)))
        connection.end()

    def _forget(self) -> None:
        """Whoever is not connected, and not refused any more."""
        now_s = self._clock()
        there = {(connection.domain, connection.address) for connection in self._connections}
        self._keys = {who: keys for who, keys in self._keys.items() if who in there}
        self._benched_until_s = {who: until_s for who, until_s in self._benched_until_s.items() if until_s > now_s}


def surplus(crowds: Mapping[Who, int], most: int) -> dict[Who, int]:
    """How many of each crowd must go for `most` to be left: the largest are cut down until they are like the next."""
    sizes, level = sorted(crowds.values(), reverse=True), max(crowds.values(), default=0)
    too_many = sum(sizes) - most
    for num_larger, following in enumerate([*sizes[1:], 0], start=1):
        if too_many <= 0:
            break
        step = min(level - following, -(-too_many // num_larger))
        level, too_many = level - step, too_many - num_larger * step
    return {who: size - level for who, size in crowds.items() if size > level}


def _address(endpoint: str) -> tuple[str, int]:
    """Of tcp://ADDRESS:PORT; port 0 of a file."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else 0
