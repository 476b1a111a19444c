"""This process's TCP connections as the kernel knows them: what has come by each, how many there are, and their end."""

import contextlib
import ctypes
import os
import socket as sockets
import stat
import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

from protocol.descriptors import descriptor_limit

HEARTBEAT_BYTES_PER_S = 48.0
"""What connections carry beside messages: ZeroMQ's heartbeats, encrypted. What comes no faster is no flood."""
_RECEIVED = struct.Struct("=Q")
_RECEIVED_AT = 128
"""Of `tcpi_bytes_received` in what Linux says about a connection."""
_RESET = struct.pack("ii", 1, 0)
"""As a linger: nothing of a connection stays, here or in the peer's queue, when ZeroMQ closes it."""
_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_INSTRUCTIONS = ((0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""For the kernel's packet filter: of a TCP header take the flags; is it a SYN, drop it; keep the rest."""
_NO_SYN = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in _INSTRUCTIONS))
_NO_SYN_PROGRAM = struct.pack("@HP", len(_INSTRUCTIONS), ctypes.addressof(_NO_SYN))
_DESCRIPTORS = Path("/proc/self/fd")
IS_SUPPORTED = hasattr(sockets, "TCP_INFO") and _DESCRIPTORS.is_dir()


@dataclass(slots=True, eq=False)
class Connection:
    """A TCP connection of this process: under which rule, from where, since when it is known, and what waits of it.

    `taken_before` is what had been taken from its descriptor, `is_inbound` whether it came from there.
    """

    domain: str
    fd: int
    inode: int
    address: str
    since_s: float
    taken_before: int
    is_inbound: bool
    offset_bytes: float = inf
    held_bytes: float = 0.0

    def count(self, taken_bytes: int, passed_s: float) -> bool:
        """Look how much waits; false if the connection is gone."""
        try:
            with borrowed(self.fd, self.inode) as tcp:
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
            with contextlib.suppress(OSError), borrowed(self.fd if copy is None else copy, self.inode) as tcp:
                if tcp is not None:
                    tcp.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, _RESET)
                    tcp.shutdown(sockets.SHUT_RDWR)
        finally:
            if copy is not None:
                os.close(copy)


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening TCP socket of this process."""

    fd: int
    inode: int

    def keep_shut(self, is_shut: bool) -> bool:
        """Have the kernel drop whatever asks to connect, who asks again in a second; or no more. False: it is gone.

        ZeroMQ accepts connections as fast as they come, in a thread of its own: this is what holds them back.
        """
        with borrowed(self.fd, self.inode) as tcp:
            if tcp is None:
                return False
            with contextlib.suppress(OSError):  # no filter to take away; a kernel without filters
                if is_shut:
                    tcp.setsockopt(sockets.SOL_SOCKET, _ATTACH_FILTER, _NO_SYN_PROGRAM)
                else:
                    tcp.setsockopt(sockets.SOL_SOCKET, _DETACH_FILTER, 0)
        return True


def listeners(ports: Collection[int]) -> list[Listener]:
    """Those that listen at one of these ports."""
    found = []
    for fd, inode in open_sockets():
        with contextlib.suppress(OSError), borrowed(fd, inode) as tcp:
            if tcp is not None and tcp.getsockopt(sockets.SOL_SOCKET, sockets.SO_ACCEPTCONN):
                found += [Listener(fd, inode)] if tcp.getsockname()[1] in ports else []
    return found


def open_sockets() -> Iterator[tuple[int, int]]:
    """Descriptors of this process, and which sockets they stand for: a number that a later one does not get."""
    for fd in _descriptors():
        with contextlib.suppress(OSError):
            status = os.fstat(fd)
            if stat.S_ISSOCK(status.st_mode):
                yield fd, status.st_ino


def _descriptors() -> Iterable[int]:
    """The numbers of those that are open; of all that may be, where there is none left to look with."""
    try:
        return [int(entry.name) for entry in os.scandir(_DESCRIPTORS)]
    except OSError:
        return range(descriptor_limit())


def num_open() -> int:
    """How many descriptors this process has."""
    try:
        return sum(1 for _ in os.scandir(_DESCRIPTORS))
    except OSError:
        return descriptor_limit()


@contextlib.contextmanager
def borrowed(fd: int, inode: int) -> Iterator[sockets.socket | None]:
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
