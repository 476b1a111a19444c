"""Who may come in from other hosts: keys on the allow-list, one-time tokens, and the stages that wait for a worker."""

import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import zmq

from coordinator.notes import FewNotes
from protocol.endpoints import checked_own_address, host_of
from protocol.errors import EndpointError, SecurityError
from protocol.flood_guard import Flood
from protocol.key_files import KeyDirectory
from protocol.security import Gatekeeper, KeyPair
from protocol.sockets import Socket

PORT = 7410
"""Of the control plane, where --listen names none. The data plane of this host has the ports after it."""
MAX_PORT = 65_000
TOKEN_LIFE_S = 15 * 60.0
_FLOODED = {
    "control": "a connection of {} to the control port",
    "return": "a connection of {} to the port of the last stage's steps",
    "first": "the connection to the first stage at {}",
}


@dataclass(frozen=True, slots=True)
class Seat:
    """A stage that a worker of another host is to take. `host` is what the allow-list calls that host."""

    worker_id: str
    host: str
    device: str

    @property
    def text(self) -> str:
        """As people read it."""
        return f"{self.worker_id.replace('-', ' ')} ({self.device} of {self.host})"


class Tokens:
    """One-time tokens, each for one host and for a while. Kept in memory: they end with the launch.

    Safe to use from several threads: the gatekeeper asks, the control plane redeems, the launch issues.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[str, tuple[str, float]] = {}

    def issue(self, host: str) -> str:
        """A new token that lets a key in under this host's name."""
        token = secrets.token_hex(16)
        with self._lock:
            self._tokens[token] = (host, self._clock() + TOKEN_LIFE_S)
        return token

    def redeem(self, token: str) -> str | None:
        """The host that a token was made for, which uses it up; None for a wrong, used or old one."""
        with self._lock:
            self._forget_old()
            found = [known for known in self._tokens if secrets.compare_digest(known.encode(), token.encode())]
            return self._tokens.pop(found[0])[0] if found else None

    def hosts(self) -> set[str]:
        """For whom there is a token that may still be used."""
        with self._lock:
            self._forget_old()
            return {host for host, _ in self._tokens.values()}

    def _forget_old(self) -> None:
        now_s = self._clock()
        self._tokens = {token: entry for token, entry in self._tokens.items() if entry[1] > now_s}


class Door:
    """Where other hosts' workers come in, and which stages wait for them.

    A key that is not on the allow-list may connect only while a token is out, and then only join with it.
    """

    def __init__(self, endpoint: str, keys: KeyDirectory, seats: Sequence[Seat]) -> None:
        """Raises SecurityError: this host has no key, or the files are not private."""
        self.endpoint = endpoint
        self.own: KeyPair = keys.own()
        self.allowed = keys.allowed
        self.allowed.names()
        self.seats = tuple(seats)
        self.tokens = Tokens()

    def gatekeeper(self, context: "zmq.Context[Socket]", on_note: Callable[[str], None]) -> Gatekeeper:
        """One that says through `on_note` whose connections it had to end, by the names on the allow-list."""
        say = FewNotes(on_note)

        def report(flood: Flood) -> None:
            names = sorted({name for key in flood.keys if (name := self.allowed.name_of(key)) is not None})
            who = f"{flood.address} ({' or '.join(names)})" if names else flood.address
            what = _FLOODED[flood.domain].format(who)
            if flood.num_strangers:
                say(f"ended {flood.num_strangers} times {what}: nobody has shaken hands there")
            else:
                say(f"ended {what}: {flood.held_bytes / 1e6:.0f} MB came that were no messages")

        return Gatekeeper(context, report)

    def may_connect(self, key: str) -> bool:
        """Asked for every connection, by the gatekeeper."""
        return self.allowed.name_of(key) is not None or bool(self.tokens.hosts())

    def unreadable(self) -> str | None:
        """Why it cannot be known at present who is allowed; None if it can."""
        try:
            self.allowed.names()
        except SecurityError as error:
            return str(error)
        return None

    def still_allows(self, key: str, host: str) -> bool:
        """Whether somebody who was let in may stay. While the list cannot be read, nobody is put out."""
        try:
            return self.allowed.names().get(key) == host
        except SecurityError:
            return True

    def admit(self, key: str, token: str | None) -> str | None:
        """The name of the host that a key belongs to; a good token puts the key on the list first. None: a stranger."""
        name = self.allowed.name_of(key)
        if name is None and token is not None:
            name = self.tokens.redeem(token)
            if name is not None:
                self.allowed.add(name, key)
        return name

    def seat_for(self, host: str, device: str, taken: Collection[str]) -> Seat | None:
        """The first free stage for a device of a host."""
        return next((s for s in self.seats if (s.host, s.device) == (host, device) and s.worker_id not in taken), None)

    def give_seat(self, worker_id: str, host: str, device: str) -> None:
        """That stage is another host's from now on."""
        self.seats = tuple(Seat(worker_id, host, device) if s.worker_id == worker_id else s for s in self.seats)

    def waiting_lines(self, waiting: Sequence[Seat]) -> list[str]:
        """For whom a launch waits, and what to run there. A host without a key gets a token, and later a new one.

        Or why nobody comes in, as long as the list cannot be read: that is mended by hand, and waited for, too.
        """
        try:
            known = set(self.allowed.names().values())
        except SecurityError as error:
            return [f"waiting for {', '.join(seat.text for seat in waiting)}, but nobody comes in: {error}"]
        lines = []
        for host in dict.fromkeys(seat.host for seat in waiting):
            seats = [seat for seat in waiting if seat.host == host]
            stages = ", ".join(f"{seat.worker_id.replace('-', ' ')} ({seat.device})" for seat in seats)
            lines.append(f"waiting for {host}: {stages}")
            is_new = host not in known and host not in self.tokens.hosts()
            token = f" --token {self.tokens.issue(host)}" if is_new else ""
            if is_new or host in known:
                command = f"glmpipe worker --join {self.endpoint} --key {shlex.quote(self.own.public)}{token}"
                lines += [f"  there: {command} --device {device}" for device in dict.fromkeys(s.device for s in seats)]
            else:
                lines.append(
                    f"  there: the command given above, whose token is good for {TOKEN_LIFE_S / 60:.0f} minutes"
                )
        return lines


def listen_endpoint(text: str) -> str:
    """`tcp://ADDR[:PORT]` with its port. Raises EndpointError for what other hosts cannot be told to come to."""
    has_port = re.search(r"[^:]:[0-9*]+$|\]:", text.removeprefix("tcp://")) is not None
    endpoint = checked_own_address(text if has_port else f"{text}:{PORT}") if text.startswith("tcp://") else ""
    if host_of(endpoint) is None or not 0 < _port(endpoint) < MAX_PORT:
        raise EndpointError(f"--listen {text}: other hosts need an address and a port, tcp://192.168.1.2:{PORT}")
    return endpoint


def _port(endpoint: str) -> int:
    port = endpoint.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0


def behind_others(hosts: Sequence[str | None]) -> list[int]:
    """The stages of this host that follow another host's, and `len(hosts)` if the way back to here does."""
    hops = zip([None, *hosts], [*hosts, None], strict=True)
    return [index for index, (before, here) in enumerate(hops) if before is not None and here is None]


def data_endpoint(listen: str, number: int) -> str:
    """Where this host's `number`-th PULL for other hosts listens: 0 is the coordinator's own, then its stages'."""
    return f"tcp://{host_of(listen)}:{_port(listen) + 1 + number}"


def guarded_endpoints(hosts: Sequence[str | None], listen: str) -> dict[int, str]:
    """Where this host's stages listen that follow another host's stage; by `len(hosts)`, the way back to here."""
    number = len(hosts) + 1
    return {index: data_endpoint(listen, (index + 1) % number) for index in behind_others(hosts)}
