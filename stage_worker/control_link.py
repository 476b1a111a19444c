"""The worker's side of the control plane: a thread that answers at once, whatever the main thread is doing.

    coordinator ROUTER <-- DEALER [control thread] PAIR <-- inproc --> PAIR [main thread]

The control thread alone owns the DEALER. It answers Ping itself, hands Assign, Inspect and Release to the main thread,
sends out what the main thread gives it, and notices every reason to leave: Shutdown, a refusal, a signal, a silent
coordinator, a dead launcher. It then wakes the main thread, which leaves; one that is stuck is not waited for.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from protocol.control import Assign, Inspect, Join, Leaving, Ping, Refused, Release, Shutdown, Welcome
from protocol.errors import ProtocolError
from protocol.limits import clip_text
from protocol.messages import Message, Plane
from protocol.sockets import Socket, connect, control_socket, receive, send
from protocol.tensors import RawTensor
from protocol.wire import decode
from stage_worker.log import logger
from stage_worker.status import Status

EXIT_ASKED = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_LOST = 3

STUCK_AFTER_S = 5.0
_POLL_S = 1.0
_PAIR_ENDPOINT = "inproc://commands"


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What the link needs to know: where to join, and the descriptors whose events mean leaving."""

    endpoint: str
    join: Join
    join_timeout_s: float
    signal_fd: int
    lifeline_fd: int | None


@dataclass(frozen=True, slots=True)
class _Exit:
    code: int
    reason: str


class ControlLink:
    """Started and closed by the main thread, which may use everything public; see the module's picture.

    `status` is what Pongs say. `on_lifeline_end` and `on_stuck` run in the control thread; the latter must not return.
    """

    def __init__(
        self,
        context: "zmq.Context[Socket]",
        settings: LinkSettings,
        pong: Callable[[Status, int], Message],
        on_lifeline_end: Callable[[], None],
        on_stuck: Callable[[int], None],
    ) -> None:
        self.status = Status()
        self._settings = settings
        self._pong = pong
        self._on_lifeline_end = on_lifeline_end
        self._on_stuck = on_stuck
        self._exit: _Exit | None = None
        self._closed = threading.Event()
        self._interrupts_seen = 0
        self._interrupts_taken = 0
        self._join_left_s = settings.join_timeout_s
        self._orphan_timeout_s: float | None = None
        self._silent_s = 0.0
        self.commands = context.socket(zmq.PAIR)
        self._main = context.socket(zmq.PAIR)
        self._dealer = control_socket(context, zmq.DEALER)
        self._main.bind(_PAIR_ENDPOINT)
        self.commands.connect(_PAIR_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="control")

    # -- the main thread's side

    def start(self) -> None:
        """Connect, send Join and go on in the control thread. Raises EndpointError."""
        self._dealer.setsockopt(zmq.ROUTING_ID, f"{self._settings.join.worker_id}.{os.getpid()}".encode()[:255])
        connect(self._dealer, self._settings.endpoint)
        send(self._dealer, self._settings.join)
        self._thread.start()

    @property
    def leaving(self) -> bool:
        """Whether the process is to end."""
        return self._exit is not None

    @property
    def exit_code(self) -> int:
        """The code to end with, once `leaving`."""
        return EXIT_INTERNAL if self._exit is None else self._exit.code

    def abandoned(self) -> bool:
        """Whether the work in hand is no longer wanted: leaving, or a Release or another Assign waits to be taken."""
        return self._exit is not None or self._interrupts_seen != self._interrupts_taken

    def take_command(self) -> Assign | Inspect | Release | None:
        """The next command; call when `commands` is readable. None: look at `leaving`."""
        frames = receive(self.commands)
        if len(frames) == 1 and not frames[0]:
            return None
        message, _ = decode(frames, Plane.CONTROL)
        assert isinstance(message, Assign | Inspect | Release)
        if isinstance(message, Assign | Release):
            self._interrupts_taken += 1
        return message

    def send(self, message: Message, tensors: Sequence[RawTensor] = ()) -> None:
        """Hand a message for the coordinator to the control thread."""
        if not self.leaving:
            send(self.commands, message, tensors)

    def close(self) -> None:
        """End the control thread and close all sockets; the last thing the main thread does."""
        self._closed.set()
        if self._thread.ident is not None:
            if self._exit is None:
                self.commands.send(b"")
            self._thread.join()
        for socket in (self.commands, self._main, self._dealer):
            socket.close()

    # -- the control thread's side

    def _run(self) -> None:
        try:
            self._serve()
        except Exception:
            logger.exception("the control thread failed")
        self._leave(EXIT_INTERNAL, "internal error of the worker")
        if not self._closed.wait(STUCK_AFTER_S):
            logger.warning("the work in hand does not end: leaving without it")
            self._on_stuck(self.exit_code)

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._dealer, self._main, self._settings.signal_fd, self._settings.lifeline_fd):
            if source is not None:
                poller.register(source, zmq.POLLIN)
        while not self.leaving and not self._closed.is_set():
            slice_s = min(_POLL_S, (self._orphan_timeout_s or self._settings.join_timeout_s) / 4)
            started_s = time.monotonic()
            events = dict(poller.poll(int(slice_s * 1000)))
            waited_s = min(slice_s, time.monotonic() - started_s)
            heard = self._dealer in events and self._receive()
            if self._main in events:
                self._send_out()
            if self._settings.signal_fd in events:
                self._on_signal()
            if self._settings.lifeline_fd in events:
                self._on_lifeline()
            self._count_silence(heard, waited_s)

    def _receive(self) -> bool:
        """Handle one message of the coordinator; whether there was a valid one."""
        try:
            message, _ = decode(receive(self._dealer), Plane.CONTROL)
        except ProtocolError as error:
            logger.warning("dropped a control message: %s", error)
            return False
        match message:
            case Ping(request_id):
                self._reply(self._pong(self.status, request_id))
            case Welcome():
                self._orphan_timeout_s = message.orphan_timeout_s
                logger.info("joined %s as %s", message.coordinator_id, self._settings.join.worker_id)
            case Refused():
                self._leave(EXIT_USAGE, f"refused by the coordinator ({message.code}): {message.text}")
            case Shutdown(request_id, reason):
                self._leave(EXIT_ASKED, reason, request_id)
            case Assign() | Inspect() | Release():
                self._hand_over(message)
            case _:
                logger.warning("dropped a %s message: not for a worker", type(message).__name__)
        return True

    def _hand_over(self, command: Assign | Inspect | Release) -> None:
        if isinstance(command, Assign) and self.status.state == "idle":
            self.status = Status("loading", command.epoch)  # a Ping may follow before the main thread looks
        try:
            send(self._main, command, flags=zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("dropped a %s message: too many are waiting", type(command).__name__)
            return
        if isinstance(command, Assign | Release):
            self._interrupts_seen += 1

    def _send_out(self) -> None:
        frames = self._main.recv_multipart(copy=False)
        if len(frames) == 1 and not len(frames[0]):
            return
        try:
            self._dealer.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            logger.warning("dropped a message: the coordinator does not take any")

    def _reply(self, message: Message) -> None:
        try:
            send(self._dealer, message, flags=zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("dropped a %s message: the coordinator does not take any", type(message).__name__)

    def _on_signal(self) -> None:
        number = os.read(self._settings.signal_fd, 1)[0]
        self._leave(EXIT_ASKED, signal.Signals(number).name)

    def _on_lifeline(self) -> None:
        assert self._settings.lifeline_fd is not None
        if not os.read(self._settings.lifeline_fd, 4096):
            self._leave(EXIT_LOST, "the launcher is gone")
            self._on_lifeline_end()

    def _count_silence(self, heard: bool, waited_s: float) -> None:
        """Add up time spent waiting, not time passed: a worker that was itself stopped listens before it judges."""
        if self._orphan_timeout_s is None:
            self._join_left_s -= waited_s
            if self._join_left_s <= 0 and not self.leaving:
                wanted = f"{self._settings.endpoint} for {self._settings.join_timeout_s:g} s"
                self._leave(EXIT_LOST, f"no coordinator answered at {wanted}")
            return
        self._silent_s = 0.0 if heard else self._silent_s + waited_s
        if self._silent_s >= self._orphan_timeout_s and not self.leaving:
            self._leave(EXIT_LOST, f"the coordinator has been silent for {self._orphan_timeout_s:g} s")

    def _leave(self, code: int, reason: str, request_id: int = 0) -> None:
        """Decide to end: say goodbye, wake the main thread."""
        if self._exit is not None:
            return
        logger.log(logging.WARNING if code else logging.INFO, "leaving: %s", reason)
        self._reply(Leaving(request_id, clip_text(reason)))
        self._exit = _Exit(code, reason)
        try:
            self._main.send(b"", flags=zmq.NOBLOCK)
        except zmq.Again:
            return  # commands are waiting, which wakes it just as well
