"""Tells clients of a launch that does not serve yet what it waits for, so that they wait with it."""

import threading
import time
from collections.abc import Callable

import zmq

from coordinator.closing import Closing
from protocol.client import NOT_SERVING, Describe, Error, Generate
from protocol.errors import ProtocolError
from protocol.limits import clip_text
from protocol.messages import Plane
from protocol.sockets import Socket, bind, client_socket
from protocol.wire import decode, encode

_POLL_MS = 100


class Reception(Closing):
    """Owns the ROUTER on which a launch serves clients. A context manager, to be closed after the launch.

    From `open` to `hand_over` a thread of its own answers there: loading takes minutes, in which nobody else can.
    """

    def __init__(self) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._router = client_socket(self._context, zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._thread: threading.Thread | None = None
        self._is_over = threading.Event()
        self.waits_for: Callable[[], str] = lambda: ""
        """Says, in any thread, what the launch waits for."""

    def open(self, endpoint: str, waits_for: Callable[[], str] | None = None) -> None:
        """Listen there, and tell clients what `waits_for` says until the launch serves; None: it serves already.

        Raises EndpointError.
        """
        bind(self._router, endpoint)
        if waits_for is None:
            return
        self.waits_for = waits_for
        since_s = time.monotonic()

        def words() -> str:
            try:
                what = self.waits_for()
            except (LookupError, ValueError):  # the launch changes its stages at this moment
                what = "its stages"
            return clip_text(f"{what}, for {time.monotonic() - since_s:.0f} s already")

        self._thread = threading.Thread(target=self._run, args=(words,), name="reception", daemon=True)
        self._thread.start()

    def hand_over(self) -> Socket:
        """The launch serves: whoever has the socket answers from now on. It is closed here."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        return self._router

    def close(self) -> None:
        """End the thread, close the socket. Safe to call twice."""
        self.hand_over().close()
        self._context.term()

    def _run(self, words: Callable[[], str]) -> None:
        while not self._is_over.is_set():
            if self._router.poll(_POLL_MS):
                self._answer(words)

    def _answer(self, words: Callable[[], str]) -> None:
        identity, *frames = self._router.recv_multipart()
        try:
            message, _ = decode(frames, Plane.CLIENT)
        except ProtocolError:
            return
        if not isinstance(message, Describe | Generate):
            return
        try:
            answer = encode(Error(message.request_id, NOT_SERVING, words()))
            self._router.send_multipart([identity, *answer], flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            return  # it is gone, or does not read
