"""The way to the coordinator: a DEALER, and over TCP what ZeroMQ reports about its connection."""

import time
from collections.abc import Callable
from enum import Enum

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.descriptors import PASSING
from protocol.errors import DescriptorError, SecurityError
from protocol.security import KeyPair, be_client
from protocol.sockets import Socket, connect, control_socket

_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


KeySource = Callable[[], KeyPair]


class News(Enum):
    """What has become of the connection."""

    UP = "up"
    DOWN = "down"
    UNKNOWN_KEY = "the coordinator does not know this worker's key"
    WRONG_SERVER = "whoever answers there has another key than --key, or is no coordinator"


class Connection:
    """One DEALER at a time. Without `keys` it is opened once, and nothing is reported: files do not drop.

    With them, ZeroMQ comes back by itself after a disconnection; after a refusal it does not, and `reopen_if_due` makes
    a fresh socket, with growing pauses, and with the key that this host has by then.
    """

    def __init__(
        self, context: "zmq.Context[Socket]", endpoint: str, keys: KeySource | None, server_key: str | None
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._read_keys = keys
        self._keys: KeyPair | None = None
        self._server_key = server_key
        self._pause_s = FIRST_PAUSE_S
        self._due_at_s: float | None = None
        self.dealer = control_socket(context, zmq.DEALER)
        self.monitor: Socket | None = None

    def open(self, routing_id: bytes) -> None:
        """Begin to connect. Raises EndpointError."""
        self._keys = self._latest_keys()
        if self._keys is None or self._server_key is None:
            self.dealer.setsockopt(zmq.ROUTING_ID, routing_id)
        else:
            be_client(self.dealer, self._keys, self._server_key)
            try:
                self.monitor = self.dealer.get_monitor_socket(_EVENTS)
            except zmq.ZMQError as error:
                if error.errno not in PASSING:
                    raise
                self._plan_reopening()  # nobody would hear of a refusal
                return
        connect(self.dealer, self._endpoint)

    @property
    def public_key(self) -> str:
        """By which the coordinator's host knows this one; empty without keys."""
        return "" if self._keys is None else self._keys.public

    def take_new_key(self) -> bool:
        """Whether this host has another key than the connection was made with: it will be made anew, with that one."""
        if self._latest_keys() == self._keys:
            return False
        self._due_at_s = time.monotonic()
        return True

    def _latest_keys(self) -> KeyPair | None:
        """This host's key now; the one before where its file cannot be read."""
        if self._read_keys is None:
            return None
        try:
            return self._read_keys()
        except SecurityError:
            return self._keys

    def news(self) -> News | None:
        """What the monitor has to say, once it is readable."""
        assert self.monitor is not None
        match recv_monitor_message(self.monitor)["event"]:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._pause_s, self._due_at_s = FIRST_PAUSE_S, None
                return News.UP
            case zmq.EVENT_DISCONNECTED:
                return News.DOWN
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._plan_reopening()
                return News.UNKNOWN_KEY
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._plan_reopening()
                return News.WRONG_SERVER
        return None

    def reopen_if_due(self) -> bool:
        """Whether the sockets are new ones: after a refusal, when its pause is over."""
        if self._due_at_s is None or time.monotonic() < self._due_at_s:
            return False
        self._due_at_s = None
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        try:
            dealer = control_socket(self._context, zmq.DEALER)
        except DescriptorError:
            self._plan_reopening()
            return False
        self.close()
        self.dealer = dealer
        self.open(b"")
        return True

    def close(self) -> None:
        """Close the sockets; a goodbye may still leave."""
        if self.monitor is not None:
            self.dealer.disable_monitor()
            self.monitor.close()
            self.monitor = None
        self.dealer.close()

    def _plan_reopening(self) -> None:
        if self._due_at_s is None:
            self._due_at_s = time.monotonic() + self._pause_s
