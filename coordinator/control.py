"""The coordinator's side of the control plane: requests with deadlines, heartbeats; `roster` says who joined.

One thread owns the ROUTER; everybody else talks to it through `ControlPlane`, whose methods may be called from any
thread and never wait without a deadline.
"""

import contextlib
import itertools
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import zmq

from coordinator.closing import Closing
from coordinator.door import Door
from coordinator.errors import StageLost
from coordinator.legible import legible
from coordinator.notes import FewNotes
from coordinator.reply import Reply
from coordinator.roster import Member, NoteSink, Roster, Sender
from protocol.control import Assign, HostModel, Join, Leaving, Ping, Progress, Refused, Welcome
from protocol.errors import ProtocolError, VersionError
from protocol.flood_guard import Inflow
from protocol.messages import Message, Plane
from protocol.records import with_changes
from protocol.security import Gatekeeper, sender_address, sender_key
from protocol.sockets import Socket, bind, control_inflow_bytes, control_socket
from protocol.wire import Frame, decode, encode

HEARTBEAT_INTERVAL_S = 1.0
ORPHAN_TIMEOUT_S = 20.0
"""A worker that hears nothing from its coordinator for so long leaves."""

ProgressSink = Callable[[str, Progress], None]
_Requests = dict[tuple[str, int], tuple["Future[Reply]", list[Frame]]]


class ControlPlane(Closing):
    """Joined workers by id. A context manager; `close` ends the thread and its socket.

    `expected` are the ids of this host's workers. Those of other hosts come in by the `door`, which gives each the id
    of its seat; `on_note` hears of those that cannot be understood, among other things.
    """

    def __init__(
        self,
        context: "zmq.Context[Socket]",
        endpoint: str,
        expected: Iterable[str],
        *,
        on_progress: ProgressSink | None = None,
        door: Door | None = None,
        gatekeeper: Gatekeeper | None = None,
        on_note: NoteSink | None = None,
        model: HostModel | None = None,
    ) -> None:
        self.coordinator_id = f"{socket.gethostname()[:100]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._on_note = on_note or (lambda _: None)
        self.roster = Roster(frozenset(expected), door, FewNotes(self._on_note), model)
        self._misunderstood: set[str] = set()
        self._on_progress = on_progress
        self._requests: _Requests = {}
        """Those without a reply, by worker and request id: no worker can answer for another. Guarded by the roster's
        `changed`."""
        self._request_ids = itertools.count(1)
        self._outgoing: queue.SimpleQueue[tuple[Socket, list[Frame]] | None] = queue.SimpleQueue()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._router = control_socket(context, zmq.ROUTER)
        self._routers = [self._router]
        self._inflow = Inflow(control_inflow_bytes())
        try:
            self.endpoint = bind(self._router, endpoint)
            if door is not None and gatekeeper is not None:
                self._routers.append(control_socket(context, zmq.ROUTER))
                gatekeeper.guard(self._routers[1], door.own, "control", door.may_connect, inflow=self._inflow)
                self._inflow.listens_at(bind(self._routers[1], door.endpoint))
        except BaseException:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._run, name="control-plane", daemon=True)
        self._thread.start()

    def begin(self, worker_id: str, message: Any) -> "Future[Reply]":
        """Send a request (its request_id is chosen here); the future holds the reply.

        Raises:
            ProtocolError: the message cannot travel, such as a path that is not valid unicode.
            StageLost: there is no such worker (any more).
        """
        return self._begin(worker_id, message)[1]

    def _begin(self, worker_id: str, message: Any) -> "tuple[int, Future[Reply]]":
        """The request's id as well."""
        request_id = next(self._request_ids)
        frames = encode(with_changes(message, request_id=request_id))
        future: Future[Reply] = Future()
        with self.roster.changed:
            worker = self.roster.workers.get(worker_id)
            if worker is None:
                raise StageLost(f"{worker_id} is not there")
            self._requests[worker_id, request_id] = future, frames
            if isinstance(message, Assign):
                worker.is_assigned, worker.is_serving = True, False
            to = worker.sender
        self._post(to, frames)
        return request_id, future

    def request(self, worker_id: str, message: Any, deadline_s: float) -> Reply:
        """Send a request and wait for its reply.

        Raises:
            StageLost: no reply within `deadline_s` seconds, or there is no such worker (any more).
        """
        request_id, future = self._begin(worker_id, message)
        try:
            return future.result(deadline_s)
        except FutureTimeout:
            with self.roster.changed:  # nobody waits for it: it need not be asked again
                self._requests.pop((worker_id, request_id), None)
            name = type(message).__name__
            raise StageLost(f"{worker_id} did not answer {name} within {deadline_s:g} s") from None

    def forget(self, worker_id: str) -> None:
        """Another worker may join under this id; nothing the old one says is heard any more."""
        with self.roster.changed:
            sender = self.roster.forget(worker_id)
            self._requests = {key: request for key, request in self._requests.items() if key[0] != worker_id}
        if sender is not None and sender.key:
            self._post(sender, encode(Refused(0, "lost", "this worker was lost, and may join again")))

    def close(self) -> None:
        """Say goodbye to the workers, end the thread, close the socket. Safe to call twice."""
        if self._thread.is_alive():
            self._outgoing.put(None)
            self._wake()
            self._thread.join()
        self._wake_sender.close()
        self._wake_receiver.close()

    def _close_sockets(self) -> None:
        for router in self._routers:
            router.close()

    def _post(self, to: Sender, frames: list[Frame]) -> None:
        """Have the thread send it."""
        self._outgoing.put((to.router, [to.identity, *frames]))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"!")

    def _run(self) -> None:
        poller = zmq.Poller()
        for router in self._routers:
            poller.register(router, zmq.POLLIN)
        poller.register(self._wake_receiver, zmq.POLLIN)
        next_ping_s = time.monotonic()
        try:
            while self._send_outgoing():
                started_s = time.monotonic()
                ready = dict(poller.poll(max(0, int((next_ping_s - started_s) * 1000))))
                self._count_silence(time.monotonic() - started_s)
                if self._wake_receiver.fileno() in ready:
                    with contextlib.suppress(BlockingIOError):
                        self._wake_receiver.recv(4096)
                for router in self._routers:
                    if router in ready:
                        self._receive(router)
                if time.monotonic() >= next_ping_s:
                    self._look_after_workers()
                    next_ping_s = time.monotonic() + HEARTBEAT_INTERVAL_S
            for sender in self.roster.living():
                self._say(sender, Leaving(0, "the launch has ended"))
        finally:
            self._close_sockets()

    def _send_outgoing(self) -> bool:
        """Send what was posted; false when asked to end."""
        with contextlib.suppress(queue.Empty):
            while True:
                outgoing = self._outgoing.get_nowait()
                if outgoing is None:
                    return False
                router, frames = outgoing
                router.send_multipart(frames)
        return True

    def _count_silence(self, waited_s: float) -> None:
        """However long one wait took (this process was stopped), it counts as one heartbeat."""
        self.roster.count_silence(min(waited_s, HEARTBEAT_INTERVAL_S))

    def _look_after_workers(self) -> None:
        """Tell those that lost the right to be here, and ask the others whether they live."""
        for sender in self.roster.drop_revoked():
            self._say(sender, Refused(0, "revoked", "this host's key has been revoked; ask whoever launches"))
        self.roster.drop_gone_spares()
        for sender in self.roster.living():
            self._say(sender, Ping(request_id=0))

    def _say(self, to: Sender, message: Message) -> None:
        to.router.send_multipart([to.identity, *encode(message)])

    def _receive(self, router: Socket) -> None:
        identity, *received = router.recv_multipart(copy=False)
        if not received:
            return
        key = address = ""
        if router is not self._router:
            self._inflow.note(received)
            key, address = sender_key(received[0]), sender_address(received[0])
        sender = Sender(router, identity.bytes, key, address)
        try:
            message, tensors = decode([frame.buffer for frame in received], Plane.CONTROL)
        except ProtocolError as error:
            self._tell_version(sender, error)
            return  # whoever sent this is no worker of ours; a worker's own silence is noticed by its heartbeat
        message = legible(message)
        if isinstance(message, Join):
            with self.roster.changed:  # at once: what is begun from now on goes to the new sender by itself
                begun = dict(self._requests)
                answer = self._admit(sender, message)
            self._say(sender, answer)
            self._ask_again(sender, begun)
            return
        found = self.roster.find(sender)
        if found is None:
            return
        worker_id, worker = found
        future = self._take_in(worker_id, worker, message)
        if isinstance(message, Progress) and self._on_progress is not None:
            # A sink that fails must not end this thread: all workers would seem silent.
            with contextlib.suppress(Exception):
                self._on_progress(worker_id, message)
        if future is not None:
            future.set_result((message, tensors))

    def _take_in(self, worker_id: str, worker: Member, message: Message) -> "Future[Reply] | None":
        """What a worker said; returns the future that waits for it."""
        with self.roster.changed:
            self.roster.note(worker, message)
            future, _ = self._requests.pop((worker_id, getattr(message, "request_id", 0)), (None, ()))
            return future

    def _ask_again(self, sender: Sender, begun: _Requests) -> None:
        """A worker that has connected anew may have lost what it was asked for, or its answer may be lost."""
        found = self.roster.find(sender)
        for (worker_id, _), (_, frames) in begun.items():
            if found is not None and worker_id == found[0]:
                sender.router.send_multipart([sender.identity, *frames])

    def _admit(self, sender: Sender, join: Join) -> Welcome | Refused:
        answer = self.roster.admit_other(sender, join) if sender.key else self.roster.admit_own(sender, join)
        if isinstance(answer, Refused):
            return answer
        is_spare = bool(answer)
        return Welcome(join.request_id, self.coordinator_id, HEARTBEAT_INTERVAL_S, ORPHAN_TIMEOUT_S, is_spare)

    def _tell_version(self, sender: Sender, error: ProtocolError) -> None:
        """Another host may have another release: tell both sides, ours once."""
        door = self.roster.door
        if not isinstance(error, VersionError) or door is None or not sender.key or not door.may_connect(sender.key):
            return
        self._say(sender, Refused(0, "version", str(error)))
        name = door.allowed.name_of(sender.key) or "a host whose key is not allowed yet"
        if name not in self._misunderstood:
            self._misunderstood.add(name)
            self._on_note(f"refused a worker of {name}: {error}")
