"""Ends connections by which more has come than any peer has to say: above all messages without an end.

ZeroMQ bounds a frame, and how many whole messages wait, but it keeps every frame of a message until the last one is
there. Linux counts the bytes that have come by a TCP connection; whoever receives counts those of the messages that it
was handed. What lies between waits in this process, whole or not, and that is what is bounded here.

It covers sockets with keys, over TCP. Files are their own user's alone; systems that count nothing (all but Linux) are
as unprotected as ZeroMQ leaves them.
"""

import contextlib
import os
import socket as sockets
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any

import zmq

LOOK_S = 0.1
"""How often somebody should `look`."""
BENCH_S = 10.0
"""How long whoever was put out is not let in again."""
HEARTBEAT_BYTES_PER_S = 48.0
"""What connections carry beside messages: ZeroMQ's heartbeats, encrypted. What comes no faster is no flood."""
MAX_KEYS = 16
_FRAME_BYTES = 42
"""What encryption and framing add to a frame, at most."""
_RECEIVED = struct.Struct("=Q")
_RECEIVED_AT = 128
"""Of `tcpi_bytes_received` in what Linux says about a connection."""
_RESET = struct.pack("ii", 1, 0)
"""As a linger: nothing of a connection stays, here or in the peer's queue, when ZeroMQ closes it."""
_DESCRIPTORS = Path("/proc/self/fd")
IS_SUPPORTED = hasattr(sockets, "TCP_INFO") and _DESCRIPTORS.is_dir()


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
    """

    domain: str
    address: str
    keys: tuple[str, ...]
    held_bytes: int


@dataclass(slots=True, eq=False)
class _Connection:
    domain: str
    fd: int
    inode: int
    address: str
    offset_bytes: float = inf
    held_bytes: float = 0.0

    def count(self, taken_bytes: int, passed_s: float) -> bool:
        """Look how much waits; false if the connection is gone."""
        try:
            with _borrowed(self.fd, self.inode) as tcp:
                if tcp is None:
                    return False
                balance = _received_bytes(tcp) - taken_bytes
        except OSError:
            return False
        self.offset_bytes = min(self.offset_bytes + HEARTBEAT_BYTES_PER_S * passed_s, balance)
        self.held_bytes = balance - self.offset_bytes
        return True

    def end(self) -> None:
        """ZeroMQ frees what it had of the message."""
        copy = None
        with contextlib.suppress(OSError):  # as when there are too many: then without
            copy = os.dup(self.fd)  # nobody else closes it, so that it is the one that was looked at
        try:
            with contextlib.suppress(OSError), _borrowed(self.fd if copy is None else copy, self.inode) as tcp:
                if tcp is not None:
                    tcp.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, _RESET)
                    tcp.shutdown(sockets.SHUT_RDWR)
        finally:
            if copy is not None:
                os.close(copy)


class FloodGuard:
    """Knows the connections that a gatekeeper has let in, and those that were made from here.

    Belongs to the gatekeeper's thread, but for `watch`.
    """

    def __init__(self, on_flood: Callable[[Flood], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_flood = on_flood
        self._clock = clock
        self._inflows: dict[str, Inflow] = {}
        self._connections: list[_Connection] = []
        self._keys: dict[tuple[str, str], list[str]] = {}
        self._benched_until_s: dict[tuple[str, str], float] = {}
        self._looked_at_s = clock()
        self._is_search_due = False

    def watch(self, domain: str, inflow: Inflow) -> None:
        """Bound what comes in under this rule."""
        self._inflows[domain] = inflow

    @property
    def num_connections(self) -> int:
        """How many it knows."""
        return len(self._connections)

    def refuses(self, domain: str, address: str, key: str) -> bool:
        """Whether this key or address was put out a moment ago."""
        now_s = self._clock()
        return any(self._benched_until_s.get((domain, who), 0.0) > now_s for who in (address, key))

    def let_in(self, domain: str, address: str, key: str) -> None:
        """Somebody is about to be: before its first message comes, its connection is found."""
        if IS_SUPPORTED and domain in self._inflows:
            keys = [*(known for known in self._keys.get((domain, address), []) if known != key), key]
            self._keys[domain, address] = keys[-MAX_KEYS:]
            self._is_search_due = not (self._search(is_new=True) and self._inflows[domain].port)

    def look(self) -> None:
        """Count what waits, at most every LOOK_S, and end connections until it is no more than the limits."""
        now_s = self._clock()
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

    def _must_search(self) -> bool:
        """Whether a connection may be there that is not known yet; those to here are found when they are let in."""
        found = {connection.domain for connection in self._connections}
        lacking = any(inflow.peer is not None and domain not in found for domain, inflow in self._inflows.items())
        return IS_SUPPORTED and (self._is_search_due or lacking)

    def _taken_bytes(self, connection: _Connection) -> int:
        return self._inflows[connection.domain].taken_bytes.get(connection.fd, 0)

    def _search(self, *, is_new: bool) -> bool:
        """Find connections from and to where it is watched. False if that must be done again.

        What has come by one that is not new may have been taken long ago.
        """
        known = {connection.inode for connection in self._connections}
        try:
            for fd, inode in _open_sockets():
                if inode not in known and (found := self._recognise(fd, inode)) is not None:
                    is_counted = is_new or self._inflows[found.domain].peer is not None
                    found.offset_bytes = -self._taken_bytes(found) if is_counted else inf
                    self._connections.append(found)
        except OSError:  # too many open files
            return False
        return True

    def _recognise(self, fd: int, inode: int) -> _Connection | None:
        with contextlib.suppress(OSError), _borrowed(fd, inode) as tcp:  # one that listens has no peer
            if tcp is not None:
                port, peer = tcp.getsockname()[1], tcp.getpeername()[:2]
                for domain, inflow in self._inflows.items():
                    if port == inflow.port or peer == inflow.peer:
                        return _Connection(domain, fd, inode, peer[0])
        return None

    def _worst(self, domain: str, limit_bytes: int) -> _Connection | None:
        """The fullest connection of the host that has most waiting here, if all have more than the limit."""
        connections = sorted((c for c in self._connections if c.domain == domain), key=lambda c: c.address)
        if sum(connection.held_bytes for connection in connections) <= limit_bytes:
            return None
        hosts = [list(group) for _, group in groupby(connections, key=lambda c: c.address)]
        fullest = max(hosts, key=lambda group: sum(connection.held_bytes for connection in group))
        return max(fullest, key=lambda connection: connection.held_bytes)

    def _put_out(self, connection: _Connection) -> None:
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


def _address(endpoint: str) -> tuple[str, int]:
    """Of tcp://ADDRESS:PORT; port 0 of a file."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port) if port.isdecimal() else 0


def _open_sockets() -> Iterator[tuple[int, int]]:
    """Descriptors of this process, and which sockets they stand for: a number that a later one does not get."""
    for entry in _DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            status = os.fstat(int(entry.name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(entry.name), status.st_ino


@contextlib.contextmanager
def _borrowed(fd: int, inode: int) -> Iterator[sockets.socket | None]:
    """ZeroMQ's descriptor as a socket; None if it is not this one (any more), or not of a TCP connection."""
    try:
        tcp = sockets.socket(fileno=fd)
    except OSError:
        yield None
        return
    try:
        is_tcp = tcp.family in (sockets.AF_INET, sockets.AF_INET6) and tcp.type == sockets.SOCK_STREAM
        yield tcp if is_tcp and os.fstat(fd).st_ino == inode else None
    finally:
        tcp.detach()


def _received_bytes(tcp: sockets.socket) -> int:
    """Since it was connected; 0 from a kernel that does not count."""
    info = tcp.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _RECEIVED_AT + _RECEIVED.size)
    return int(_RECEIVED.unpack_from(info, _RECEIVED_AT)[0]) if len(info) >= _RECEIVED_AT + _RECEIVED.size else 0
