"""The worker's side of the control plane: a thread that answers at once, whatever the main thread is doing.

    coordinator ROUTER <-- DEALER [control thread] PAIR <-- inproc --> PAIR [main thread]
                                           wake PUSH --- inproc --> PULL (the data plane's)

The control thread alone owns the DEALER. It answers Ping itself, hands Assign, Inspect and Release to the main thread,
sends out what the main thread gives it, and notices every reason to leave: Shutdown, a refusal, a signal, a silent
coordinator, a dead launcher. It then wakes the main thread, which leaves; one that is stuck is not waited for. The main
thread waits in one place, for steps: an empty message among them means that there is something to look at here.

A worker of another host than the coordinator's stays when it loses one: it tells the main thread, which keeps its
weights, and joins whichever coordinator comes next at the same address with the same key.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import zmq

from protocol.control import Assign, Inspect, Join, Leaving, Ping, Refused, Release, Shutdown, Welcome
from protocol.errors import ProtocolError, VersionError
from protocol.limits import clip_text
from protocol.messages import Message, Plane
from protocol.security import KeyPair
from protocol.sockets import Socket, data_socket, receive, send
from protocol.tensors import RawTensor
from protocol.wire import decode
from stage_worker.connection import Connection, News
from stage_worker.data_plane import WAKE
from stage_worker.exits import EXIT_ASKED, EXIT_INTERNAL, EXIT_LOST, EXIT_REFUSED, Exit, was_asked
from stage_worker.log import logger
from stage_worker.status import Status
from stage_worker.waiting import RefusalNotes, WaitingNotes

STUCK_AFTER_S = 5.0
TAKEN_AFTER_S = 60.0
"""A main thread that has not looked for so long at what makes its work unwanted hangs: nothing will come of it."""
_POLL_S = 1.0
_MAY_MEND = ("no_seat", "unknown_key")
"""Refusals that somebody may lift at the launching host: a worker of another host asks again."""
_PAIR_ENDPOINT = "inproc://commands"
_LOST = b"lost"
ASK_AGAIN_S = 5.0
"""After a coordinator said that it has no stage for this worker."""


@dataclass(frozen=True, slots=True)
class CoordinatorLost:
    """For the main thread: nobody will ask for what is being served; the next coordinator may want the same weights."""


Command = Assign | Inspect | Release | CoordinatorLost


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What the link needs to know: where to join, and the descriptors whose events mean leaving.

    `keys` and `server_key` are there for a coordinator on another host, or neither is. `join` says what the worker has
    at the time; `join_timeout_s` None waits for ever.
    """

    endpoint: str
    worker_id: str
    join: Callable[[], Join]
    join_timeout_s: float | None
    signal_fd: int
    lifeline_fd: int | None
    keys: Callable[[], KeyPair] | None = None
    server_key: str | None = None
    has_token: bool = False


class ControlLink:
    """Started and closed by the main thread, which may use everything public; see the module's picture.

    `status` is what Pongs say. `on_lifeline_end` and `on_stuck` run in the control thread; the latter must not return.
    """

    def __init__(
        self,
        context: "zmq.Context[Socket]",
        settings: LinkSettings,
        pong: Callable[[Status, int, int], Message],
        on_lifeline_end: Callable[[], None],
        on_stuck: Callable[[int], None],
        wake_endpoint: str,
    ) -> None:
        self.status = Status()
        self.num_taken = 0
        """Steps that have arrived since the assignment, counted by the main thread."""
        self._settings = settings
        self._pong = pong
        self._on_lifeline_end = on_lifeline_end
        self._on_stuck = on_stuck
        self._exit: Exit | None = None
        self._closed = threading.Event()
        self._interrupts_seen = 0
        self._interrupts_taken = 0
        self._untaken_s = 0.0
        self._taken_before = 0
        self._coordinator_id: str | None = None
        self._ask_again_s: float | None = None
        self._last_assign: Assign | None = None
        self._join_left_s = settings.join_timeout_s
        self._orphan_timeout_s: float | None = None
        self._silent_s = 0.0
        has_key = settings.keys is not None
        self._waiting = WaitingNotes(settings.endpoint, settings.join_timeout_s, has_key=has_key)
        self._refusals = RefusalNotes()
        self.commands = context.socket(zmq.PAIR)
        self._main = context.socket(zmq.PAIR)
        self._wake = data_socket(context, zmq.PUSH)
        self._connection = Connection(context, settings.endpoint, settings.keys, settings.server_key)
        self._poller = zmq.Poller()
        self._main.bind(_PAIR_ENDPOINT)
        self.commands.connect(_PAIR_ENDPOINT)
        self._wake.connect(wake_endpoint)
        self._thread = threading.Thread(target=self._run, name="control")

    # -- the main thread's side

    def start(self) -> None:
        """Connect, send Join and go on in the control thread. Raises EndpointError."""
        self._connection.open(f"{self._settings.worker_id}.{os.getpid()}".encode()[:255])
        if self._connection.monitor is None:
            send(self._connection.dealer, self._settings.join())
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

    def take_command(self) -> Command | None:
        """The next command; None if there is none now, or if it is time to look at `leaving`."""
        try:
            frames = receive(self.commands, zmq.NOBLOCK)
        except zmq.Again:
            return None
        if len(frames) == 1 and frames[0] == _LOST:
            self._interrupts_taken += 1
            return CoordinatorLost()
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
        for socket in (self.commands, self._main, self._wake):
            socket.close()
        self._connection.close()

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
        self._watch()
        while not self.leaving and not self._closed.is_set():
            if self._connection.reopen_if_due():
                self._watch()
            slice_s = min(_POLL_S, (self._orphan_timeout_s or self._settings.join_timeout_s or _POLL_S) / 4)
            started_s = time.monotonic()
            events = dict(self._poller.poll(int(slice_s * 1000)))
            waited_s = min(slice_s, time.monotonic() - started_s)
            heard = self._connection.dealer in events and self._receive()
            if self._connection.monitor is not None and self._connection.monitor in events:
                self._on_news(self._connection.news())
            if self._main in events:
                self._send_out()
            if self._settings.signal_fd in events:
                self._on_signal()
            if self._settings.lifeline_fd in events:
                self._on_lifeline()
            self._count_silence(heard, waited_s)
            self._count_untaken(waited_s)

    def _watch(self) -> None:
        """Watch the sockets as they are now."""
        self._poller = zmq.Poller()
        connection, settings = self._connection, self._settings
        for source in (connection.dealer, connection.monitor, self._main, settings.signal_fd, settings.lifeline_fd):
            if source is not None:
                self._poller.register(source, zmq.POLLIN)

    def _on_news(self, news: News | None) -> None:
        if news is News.UP:
            self._reply(self._settings.join())
        elif news in (News.UNKNOWN_KEY, News.WRONG_SERVER):
            assert news is not None
            self._waiting.answered()
            self._refusals.say(f"not let in at {self._settings.endpoint}: {news.value}{self._remedy(news)}")

    def _remedy(self, news: News) -> str:
        if news is not News.UNKNOWN_KEY:
            return ""
        used = "; its token is too old, or was used long ago: take the one that the launch gives out now"
        allow = f"; there: glmpipe keys allow NAME_OF_THIS_HOST '{self._connection.public_key}'"
        return f"{used}, or{allow[1:]}" if self._settings.has_token else allow

    def _receive(self) -> bool:
        """Handle one message of the coordinator; whether there was a valid one."""
        try:
            message, _ = decode(receive(self._connection.dealer), Plane.CONTROL)
        except ProtocolError as error:
            if isinstance(error, VersionError) and self._settings.keys is not None:
                self._leave(EXIT_REFUSED, f"the coordinator is of another release: {error}")
            logger.warning("dropped a control message: %s", error)
            return False
        match message:
            case Ping(request_id):
                self._reply(self._pong(self.status, request_id, self.num_taken))  # in this order: never too few
            case Welcome():
                self._on_welcome(message)
            case Refused() if message.code == "lost" and self._settings.keys is not None:
                self._lose_coordinator("it has missed this worker")
                self._reply(self._settings.join())
            case Refused() if message.code in _MAY_MEND and self._settings.keys is not None:
                self._waiting.answered()
                self._refusals.say(f"asking again every {ASK_AGAIN_S:g} s: {message.text}")
                self._ask_again_s = ASK_AGAIN_S
            case Refused() if message.code == "revoked" and self._connection.take_new_key():
                self._lose_coordinator("it has revoked this host's key, which was replaced; joining with the new one")
            case Refused():
                self._leave(EXIT_REFUSED, f"refused by the coordinator ({message.code}): {message.text}")
            case Shutdown(request_id, reason):
                self._leave(EXIT_ASKED, reason, request_id)
            case Leaving(_, reason):
                self._on_farewell(reason)
            case Assign() | Inspect() | Release():
                self._hand_over(message)
            case _:
                logger.warning("dropped a %s message: not for a worker", type(message).__name__)
        return True

    def _on_welcome(self, welcome: Welcome) -> None:
        if self._coordinator_id not in (None, welcome.coordinator_id):
            self._lose_coordinator("another one has taken its place")
        self._coordinator_id = welcome.coordinator_id
        self._refusals.over()
        self._orphan_timeout_s = welcome.orphan_timeout_s
        logger.info("joined %s as %s", welcome.coordinator_id, self._settings.worker_id)
        if welcome.is_spare:
            logger.info("held as a spare: the plan has no stage for this worker until another one is lost")
            if self.status.epoch:
                self._forget_stage()

    def _lose_coordinator(self, what: str) -> None:
        """Let the main thread forget what it serves, and wait for the next coordinator."""
        logger.warning("lost %s: %s; keeping the weights for the next one", self._coordinator_id, what)
        self._be_alone()

    def _be_alone(self) -> None:
        self._coordinator_id = self._orphan_timeout_s = None
        self._silent_s = 0.0
        self._waiting.answered()
        self._forget_stage()

    def _on_farewell(self, reason: str) -> None:
        """It ends as it should: who is of its host ends as well, who is not waits for the next one."""
        if self._settings.keys is None:
            self._leave(EXIT_ASKED, reason)
        else:
            logger.info("%s says goodbye: %s; keeping the weights for the next one", self._coordinator_id, reason)
            self._be_alone()

    def _forget_stage(self) -> None:
        """The main thread gives up sequences and hops, but not the weights."""
        self._interrupts_seen += 1
        self._last_assign = None  # the same again is not asked in vain
        self._main.send(_LOST, flags=zmq.NOBLOCK)
        self._wake_main()

    def _hand_over(self, command: Assign | Inspect | Release) -> None:
        if isinstance(command, Assign):
            if command == self._last_assign and self.status.state == "loading":
                return  # asked again after a reconnection: the answer is on its way
            self._last_assign = command
        if isinstance(command, Assign) and self.status.state == "idle":
            self.status = Status("loading", command.epoch)  # a Ping may follow before the main thread looks
        try:
            send(self._main, command, flags=zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("dropped a %s message: too many are waiting", type(command).__name__)
            return
        if isinstance(command, Assign | Release):
            self._interrupts_seen += 1
        self._wake_main()

    def _wake_main(self) -> None:
        with suppress(zmq.Again):  # as many wakings wait as the queue holds: one is enough
            self._wake.send(WAKE, flags=zmq.NOBLOCK)

    def _send_out(self) -> None:
        frames = self._main.recv_multipart(copy=False)
        if len(frames) == 1 and not len(frames[0]):
            return
        try:
            self._connection.dealer.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            logger.warning("dropped a message: the coordinator does not take any")

    def _reply(self, message: Message) -> None:
        try:
            send(self._connection.dealer, message, flags=zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("dropped a %s message: the coordinator does not take any", type(message).__name__)

    def _on_signal(self) -> None:
        number = os.read(self._settings.signal_fd, 1)[0]
        self._leave(128 + number, signal.Signals(number).name)

    def _on_lifeline(self) -> None:
        assert self._settings.lifeline_fd is not None
        if not os.read(self._settings.lifeline_fd, 4096):
            self._leave(EXIT_LOST, "the launcher is gone")
            self._on_lifeline_end()

    def _count_silence(self, heard: bool, waited_s: float) -> None:
        """Add up time spent waiting, not time passed: a worker that was itself stopped listens before it judges."""
        if self._ask_again_s is not None:
            self._ask_again_s -= waited_s
            if self._ask_again_s <= 0:
                self._ask_again_s = None
                self._reply(self._settings.join())
        if self._orphan_timeout_s is None:
            if self._settings.lifeline_fd is None:  # else its launcher knows what it waits for
                self._waiting.wait(waited_s)
            if self._join_left_s is None:
                return
            self._join_left_s -= waited_s
            if self._join_left_s <= 0 and not self.leaving:
                wanted = f"{self._settings.endpoint} for {self._settings.join_timeout_s:g} s"
                self._leave(EXIT_LOST, f"no coordinator answered at {wanted}")
            return
        self._silent_s = 0.0 if heard else self._silent_s + waited_s
        if self._silent_s >= self._orphan_timeout_s and not self.leaving:
            silence = f"silent for {self._orphan_timeout_s:g} s"
            if self._settings.keys is None:
                self._leave(EXIT_LOST, f"the coordinator has been {silence}")
            else:
                self._lose_coordinator(silence)
                self._ask_again_s = ASK_AGAIN_S

    def _count_untaken(self, waited_s: float) -> None:
        """Somebody else must take the place of a main thread that hangs, however well this thread answers."""
        taken = self._interrupts_taken
        if taken == self._interrupts_seen or taken != self._taken_before:
            self._untaken_s, self._taken_before = 0.0, taken
            return
        self._untaken_s += waited_s
        if self._untaken_s >= TAKEN_AFTER_S:
            self._leave(EXIT_LOST, f"the work in hand has not ended for {TAKEN_AFTER_S:g} s since it is not wanted")

    def _leave(self, code: int, reason: str, request_id: int = 0) -> None:
        """Decide to end: say goodbye, wake the main thread."""
        if self._exit is not None:
            return
        logger.log(logging.INFO if was_asked(code) else logging.WARNING, "leaving: %s", reason)
        self._reply(Leaving(request_id, clip_text(reason)))
        self._exit = Exit(code, reason)
        self._wake_main()
