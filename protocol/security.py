"""CURVE on sockets: key pairs, servers that admit only whom a rule lets in, clients that pin their server's key.

ZeroMQ asks a handler inside the process (ZAP) about every key that connects to a server. `Gatekeeper` is that handler.
Without one, or for a domain without a rule, nobody is admitted.
"""

import contextlib
import re
import socket as sockets
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import zmq
from zmq.utils import z85

from protocol.errors import SecurityError
from protocol.flood_guard import Flood, FloodGuard, Inflow

Socket = zmq.Socket[bytes]
Rule = Callable[[str], bool]
"""Whether the client with this public key may connect. Runs in the gatekeeper's thread."""

KEY_CHARACTERS = 40
_Z85 = re.compile(rf"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{{}}@%$#-]{{{KEY_CHARACTERS}}}")
_NOTHING_BYTES = 2**20
"""A handshake, and what is on its way until somebody looks."""
_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both keys in Z85 (40 characters). Raises SecurityError for what is none."""

    public: str
    secret: str = field(repr=False)

    def __post_init__(self) -> None:
        checked_key(self.public)
        try:
            matches = zmq.curve_public(self.secret.encode()).decode() == self.public
        except (ValueError, zmq.ZMQError):
            matches = False
        if not matches:
            raise SecurityError(f"the secret key does not belong to the public key {self.public}")


def new_key_pair() -> KeyPair:
    """A fresh one. Its public key begins with a letter or digit, so that no command line takes it for an option."""
    while True:
        public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
        if public[0].isalnum():
            return KeyPair(public, secret)


def checked_key(text: str) -> str:
    """`text` if it is a public key in Z85. Raises SecurityError."""
    if _Z85.fullmatch(text):
        with contextlib.suppress(struct.error):
            z85.decode(text.encode("ascii"))
            return text
    raise SecurityError(
        f"{text!r:.80} is no public key, which has {KEY_CHARACTERS} characters: take the one that `glmpipe keys show` "
        "prints, in single quotes"
    )


def be_client(socket: Socket, keys: KeyPair, server_key: str) -> None:
    """Make `socket` talk, encrypted, only to the server with this public key. Before `connect`."""
    socket.curve_serverkey = checked_key(server_key).encode()
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()


def sender_key(frame: zmq.Frame) -> str:
    """The public key that the sender of a received frame has proved to own; empty on a socket without keys."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def sender_address(frame: zmq.Frame) -> str:
    """The IP address that a received frame came from; empty where there is none, as of files."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return ""


class Gatekeeper:
    """Decides who may connect to the guarded sockets of one context. A context manager: close it before the context.

    `on_flood` hears, in the gatekeeper's thread, of connections that it has ended, see `flood_guard`.
    """

    def __init__(self, context: "zmq.Context[Socket]", on_flood: Callable[[Flood], None] = lambda _: None) -> None:
        self._floods = FloodGuard(on_flood)
        self._rules: dict[str, tuple[Rule, bytes]] = {}
        self._wake_receiver, self._wake_sender = sockets.socketpair()
        self._handler = context.socket(zmq.REP)
        self._handler.linger = 0
        self._handler.bind(_ZAP_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="gatekeeper", daemon=True)
        self._thread.start()

    def guard(
        self,
        socket: Socket,
        keys: KeyPair,
        domain: str,
        rule: Rule,
        *,
        may_retry: bool = False,
        inflow: Inflow | None = None,
    ) -> None:
        """Make `socket` an encrypted server that admits whom `rule` lets in. Before `bind`.

        `domain` names the rule; a later rule of the same name replaces it. Whoever is refused is told so and gives
        up; with `may_retry` the connection is just closed, and the client tries again. `inflow` bounds what comes in
        and is not taken; whoever receives must tell it of every message.
        """
        if inflow is not None:
            self._floods.watch(domain, inflow)
        self._rules[domain] = (rule, b"300" if may_retry else b"400")
        socket.curve_server = True
        socket.curve_secretkey = keys.secret.encode()
        socket.zap_domain = domain.encode()
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def expect_nothing(self, domain: str) -> Inflow:
        """Bound what comes back by a socket that only sends; tell the inflow where that leads to."""
        inflow = Inflow(_NOTHING_BYTES)
        self._floods.watch(domain, inflow)
        return inflow

    def close(self) -> None:
        """Admit nobody any more. Safe to call twice."""
        if self._thread.is_alive():
            self._wake_sender.send(b"!")
            self._thread.join()
        self._wake_sender.close()
        self._wake_receiver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._handler, zmq.POLLIN)
        poller.register(self._wake_receiver, zmq.POLLIN)
        try:
            while self._wake_receiver.fileno() not in (ready := dict(poller.poll(int(1000 * self._floods.pause_s)))):
                if self._handler in ready:
                    self._handler.send_multipart(self._answer(self._handler.recv_multipart()))
                self._floods.look()
        finally:
            self._handler.close()

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """The reply to a request (ZeroMQ RFC 27): version, id, domain, address, identity, mechanism, credentials."""
        request_id, status, user = request[1] if len(request) > 1 else b"", b"400", b""
        if len(request) == 7 and request[0] == b"1.0" and request[5] == b"CURVE" and len(request[6]) == 32:
            key = z85.encode(request[6]).decode("ascii")
            domain, address = request[2].decode("utf-8", "replace"), request[3].decode("utf-8", "replace")
            rule, status = self._rules.get(domain, (_nobody, b"400"))
            with contextlib.suppress(Exception):  # a rule that fails lets nobody in, and must not end this thread
                if self._floods.refuses(domain, address, key):
                    status = b"300"
                elif rule(key):
                    self._floods.let_in(domain, address, key)
                    status, user = b"200", key.encode("ascii")
        return [b"1.0", request_id, status, b"OK" if status == b"200" else b"not admitted", user, b""]


def _nobody(_key: str) -> bool:
    return False
