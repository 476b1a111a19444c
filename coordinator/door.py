"""Who may come in from other hosts: keys on the allow-list, one-time tokens, and the stages that wait for a worker."""

import contextlib
import os
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

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
TOKEN_LIFE_S = USED_TOKEN_S = 15 * 60.0
"""How long a token is good, and how long it is known by whom it was used."""
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


@dataclass(slots=True)
class _Token:
    host: str
    until_s: float
    used_by: str | None = None


class Tokens:
    """One-time tokens, each for one host and for a while. Kept in memory: they end with the launch.

    One that was used is remembered for that while, so that whoever comes with it later hears by which key it was.
    Safe to use from several threads: the gatekeeper asks, the control plane redeems, the launch issues.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens: dict[str, _Token] = {}

    def issue(self, host: str) -> str:
        """A new token that lets a key in under this host's name."""
        token = secrets.token_hex(16)
        with self._lock:
            self._tokens[token] = _Token(host, self._clock() + TOKEN_LIFE_S)
        return token

    def redeem(self, token: str, key: str) -> str | None:
        """The host that a token was made for, which uses it up; None for a wrong, used or old one."""
        with self._lock:
            found = self._find(token)
            if found is None or found.used_by is not None:
                return None
            found.used_by, found.until_s = key, self._clock() + USED_TOKEN_S
            return found.host

    def used_by(self, token: str) -> str | None:
        """The key that a token has let in; None if that is not known of it."""
        with self._lock:
            found = self._find(token)
            return None if found is None else found.used_by

    def hosts(self) -> set[str]:
        """For whom there is a token that may still be used."""
        with self._lock:
            self._forget_old()
            return {token.host for token in self._tokens.values() if token.used_by is None}

    def any_known(self) -> bool:
        """Whether somebody may come with a token who is to be heard, if only to be told that it was used."""
        with self._lock:
            self._forget_old()
            return bool(self._tokens)

    def _find(self, token: str) -> _Token | None:
        self._forget_old()
        same = (known for known in self._tokens if secrets.compare_digest(known.encode(), token.encode()))
        return self._tokens.get(next(same, ""))

    def _forget_old(self) -> None:
        now_s = self._clock()
        self._tokens = {text: token for text, token in self._tokens.items() if token.until_s > now_s}


class Door:
    """Where other hosts' workers come in, and which stages wait for them.

    A key that is not on the allow-list may connect only while a token is known, and then only join with it. Tokens are
    secret: they are shown where `token_dir` is None, which is for a terminal, and otherwise put into a file there.
    """

    def __init__(self, endpoint: str, keys: KeyDirectory, seats: Sequence[Seat], token_dir: Path | None = None) -> None:
        """Raises SecurityError: this host has no key, or the files are not private."""
        self._token_dir = token_dir
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
        return self.allowed.name_of(key) is not None or self.tokens.any_known()

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
            name = self.tokens.redeem(token, key)
            if name is not None:
                self.allowed.add(name, key)
                self._withdraw(name)
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
            if is_new or host in known:
                command = f"glmpipe worker --join {self.endpoint} --key {shlex.quote(self.own.public)}"
                token = " --token-file -" if is_new else ""
                devices = dict.fromkeys(seat.device for seat in seats)
                lines += [f"  there: {command}{token} --device {device}" for device in devices]
                lines += [self._hand_out(host)] if is_new else []
            else:
                lines.append(
                    f"  there: the command given above, whose token is good for {TOKEN_LIFE_S / 60:.0f} minutes"
                )
        return lines

    def _hand_out(self, host: str) -> str:
        """Where a new token for this host is found: its words go nowhere that others read, or that is kept."""
        token, good = self.tokens.issue(host), f"good once, for {TOKEN_LIFE_S / 60:.0f} minutes"
        if self._token_dir is None:
            return f"  which asks for this token, {good}: {token}"
        path = self._token_dir / f"token-{host}"
        try:
            path.unlink(missing_ok=True)
            with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(f"{token}\n")
        except OSError as error:
            return f"  no token can be given: {path}: {error.strerror}; use `glmpipe keys allow {host} 'ITS KEY'`"
        return f"  which asks for the token that is in {path}, {good}"

    def _withdraw(self, host: str) -> None:
        if self._token_dir is not None:
            with contextlib.suppress(OSError):
                (self._token_dir / f"token-{host}").unlink(missing_ok=True)


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
