"""The coordinator's side of the control plane: who joined, requests with deadlines, heartbeats.

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
from dataclasses import dataclass, field
from typing import Any

import zmq

from coordinator.closing import Closing
from coordinator.door import Door, Seat
from coordinator.errors import LaunchError, StageLost
from coordinator.reply import Reply
from protocol.control import Assign, Join, Leaving, Ping, Pong, Progress, Ready, Refused, Welcome
from protocol.errors import ProtocolError, SecurityError, VersionError
from protocol.messages import Message, Plane
from protocol.records import with_changes
from protocol.security import Gatekeeper, sender_key
from protocol.sockets import Socket, bind, control_socket
from protocol.version import VERSION
from protocol.wire import Frame, decode, encode

HEARTBEAT_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 2.8
"""A serving worker that answered no ping for so long counts as lost. Its control thread answers during long steps."""
LOADING_SILENCE_LIMIT_S = 15.0
"""The same for one that starts or loads, when a disk or a whole machine may be stuck for a while."""
ORPHAN_TIMEOUT_S = 20.0
"""A worker that hears nothing from its coordinator for so long leaves."""

ProgressSink = Callable[[str, Progress], None]
NoteSink = Callable[[str], None]


@dataclass(slots=True)
class _Worker:
    router: Socket
    identity: bytes
    join: Join
    key: str = ""
    """What it proved to own when it joined; empty for a worker of this host."""
    is_assigned: bool = False
    is_serving: bool = False
    silent_s: float = 0.0
    pong: Pong | None = None
    left: str | None = None


@dataclass(slots=True)
class _Shared:
    """What the thread and its callers share, guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    workers: dict[str, _Worker] = field(default_factory=dict)
    futures: dict[tuple[str, int], Future[Reply]] = field(default_factory=dict)
    """By worker and request id: no worker can answer for another."""


class ControlPlane(Closing):
    """Joined workers by id. A context manager; `close` ends the thread and its socket.

    Only the ids in `expected` may join, each once, and only with this version of glmpipe. Workers of other hosts come
    in by the `door`, which gives each the id of its seat; `on_note` hears of those that cannot be understood.
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
    ) -> None:
        self.coordinator_id = f"{socket.gethostname()[:100]}-{os.getpid()}-{secrets.token_hex(4)}"
        self._own = frozenset(expected)
        self._seats = () if door is None else door.seats
        self._expected = self._own | {seat.worker_id for seat in self._seats}
        self._door = door
        self._on_note = on_note or (lambda _: None)
        self._misunderstood: set[str] = set()
        self._on_progress = on_progress
        self._shared = _Shared()
        self._request_ids = itertools.count(1)
        self._outgoing: queue.SimpleQueue[tuple[Socket, list[Frame]] | None] = queue.SimpleQueue()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._router = control_socket(context, zmq.ROUTER)
        self._routers = [self._router]
        try:
            self.endpoint = bind(self._router, endpoint)
            if door is not None and gatekeeper is not None:
                self._routers.append(control_socket(context, zmq.ROUTER))
                gatekeeper.guard(self._routers[1], door.own, "control", door.may_connect)
                bind(self._routers[1], door.endpoint)
        except BaseException:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._run, name="control-plane", daemon=True)
        self._thread.start()

    def wait_for_joins(self, deadline_s: float, check: Callable[[], None]) -> dict[str, Join]:
        """Block until every expected worker joined; `check` runs every 0.1 s and may raise.

        Workers of other hosts are waited for as long as it takes.

        Raises:
            LaunchError: some of this host have not within `deadline_s` seconds.
        """
        give_up_at = time.monotonic() + deadline_s
        shared = self._shared
        while True:
            with shared.changed:
                shared.changed.wait_for(lambda: len(shared.workers) == len(self._expected), timeout=0.1)
                joined = {worker_id: worker.join for worker_id, worker in shared.workers.items()}
            if len(joined) == len(self._expected):
                return joined
            check()
            absent = ", ".join(sorted(self._own - joined.keys()))
            if absent and time.monotonic() > give_up_at:
                raise LaunchError(f"{absent} did not join within {deadline_s:.0f} s; look at its log lines above")

    def waiting_seats(self) -> tuple[Seat, ...]:
        """The stages that no other host's worker has taken yet."""
        with self._shared.changed:
            return tuple(seat for seat in self._seats if seat.worker_id not in self._shared.workers)

    def begin(self, worker_id: str, message: Any) -> "Future[Reply]":
        """Send a request (its request_id is chosen here); the future holds the reply.

        Raises:
            ProtocolError: the message cannot travel, such as a path that is not valid unicode.
        """
        request_id = next(self._request_ids)
        frames = encode(with_changes(message, request_id=request_id))
        future: Future[Reply] = Future()
        with self._shared.changed:
            self._shared.futures[worker_id, request_id] = future
            worker = self._shared.workers[worker_id]
            if isinstance(message, Assign):
                worker.is_assigned, worker.is_serving = True, False
            to = worker.router, [worker.identity, *frames]
        self._outgoing.put(to)
        self._wake()
        return future

    def request(self, worker_id: str, message: Any, deadline_s: float) -> Reply:
        """Send a request and wait for its reply.

        Raises:
            StageLost: no reply within `deadline_s` seconds, or the worker left.
        """
        try:
            return self.begin(worker_id, message).result(deadline_s)
        except FutureTimeout:
            name = type(message).__name__
            raise StageLost(f"{worker_id} did not answer {name} within {deadline_s:g} s") from None

    def lost(self) -> dict[str, str]:
        """The ids of workers that left or fell silent, and what happened; empty while all are well."""
        found = {}
        with self._shared.changed:
            for worker_id, worker in self._shared.workers.items():
                if worker.left is not None:
                    found[worker_id] = f"left: {worker.left}"
                elif worker.silent_s > (SILENCE_LIMIT_S if worker.is_serving else LOADING_SILENCE_LIMIT_S):
                    found[worker_id] = f"has been silent for {worker.silent_s:.1f} s"
        return found

    def forget(self, worker_id: str) -> None:
        """Another worker may join under this id; nothing the old one says is heard any more."""
        with self._shared.changed:
            worker = self._shared.workers.pop(worker_id, None)
        if worker is not None and worker.key:
            refusal = Refused(0, "lost", "this worker was lost, and may join again")
            self._outgoing.put((worker.router, [worker.identity, *encode(refusal)]))
            self._wake()

    def pongs(self) -> dict[str, Pong]:
        """The latest health report of each worker that gave one."""
        with self._shared.changed:
            return {i: w.pong for i, w in self._shared.workers.items() if w.pong is not None}

    def close(self) -> None:
        """End the thread, close the socket. Safe to call twice."""
        if self._thread.is_alive():
            self._outgoing.put(None)
            self._wake()
            self._thread.join()
        self._wake_sender.close()
        self._wake_receiver.close()

    def _close_sockets(self) -> None:
        for router in self._routers:
            router.close()

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
                    self._drop_revoked()
                    self._ping_all()
                    next_ping_s = time.monotonic() + HEARTBEAT_INTERVAL_S
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

    def _ping_all(self) -> None:
        with self._shared.changed:
            living = [(w.router, w.identity) for w in self._shared.workers.values() if w.left is None]
        for router, identity in living:
            router.send_multipart([identity, *encode(Ping(request_id=0))])

    def _drop_revoked(self) -> None:
        """A worker whose key is no longer allowed is lost at once, and told."""
        with self._shared.changed:
            revoked = [w for w in self._shared.workers.values() if w.left is None and not self._is_allowed(w)]
            for worker in revoked:
                worker.left = f"the key of {worker.join.host} has been revoked"
        for worker in revoked:
            refusal = Refused(0, "revoked", "this host's key has been revoked; ask whoever launches")
            worker.router.send_multipart([worker.identity, *encode(refusal)])

    def _is_allowed(self, worker: _Worker) -> bool:
        if not worker.key or self._door is None:
            return True
        return self._door.allowed.name_of(worker.key) == worker.join.host

    def _count_silence(self, waited_s: float) -> None:
        """Add up time spent waiting, not time passed: a launch that was itself stopped listens before it judges."""
        with self._shared.changed:
            for worker in self._shared.workers.values():
                worker.silent_s += min(waited_s, HEARTBEAT_INTERVAL_S)

    def _receive(self, router: Socket) -> None:
        identity, *received = router.recv_multipart(copy=False)
        if not received:
            return
        key = sender_key(received[0]) if router is not self._router else ""
        try:
            message, tensors = decode([frame.buffer for frame in received], Plane.CONTROL)
        except ProtocolError as error:
            self._tell_version(router, identity.bytes, key, error)
            return  # whoever sent this is no worker of ours; a worker's own silence is noticed by its heartbeat
        if isinstance(message, Join):
            admitted = self._admit_other(identity.bytes, key, message) if key else self._admit(identity.bytes, message)
            router.send_multipart([identity.bytes, *encode(admitted)])
            return
        with self._shared.changed:
            sender = (router, identity.bytes, key)
            workers = self._shared.workers.items()
            found = next(((i, w) for i, w in workers if (w.router, w.identity, w.key) == sender), None)
            if found is None or not self._is_allowed(found[1]):
                return
            worker_id, worker = found
            worker.silent_s = 0.0
            future = self._note(worker_id, worker, message)
        if isinstance(message, Progress) and self._on_progress is not None:
            # A sink that fails must not end this thread: all workers would seem silent.
            with contextlib.suppress(Exception):
                self._on_progress(worker_id, message)
        if future is not None:
            future.set_result((message, tensors))

    def _tell_version(self, router: Socket, identity: bytes, key: str, error: ProtocolError) -> None:
        """Another host may have another release: tell both sides, ours once."""
        name = self._door.allowed.name_of(key) if self._door is not None and key else None
        if name is None or not isinstance(error, VersionError):
            return
        router.send_multipart([identity, *encode(Refused(0, "version", str(error)))])
        if name not in self._misunderstood:
            self._misunderstood.add(name)
            self._on_note(f"a worker of {name} was refused: {error}")

    def _note(self, worker_id: str, worker: _Worker, message: Message) -> "Future[Reply] | None":
        """Take in what a worker said; returns the future that waits for it."""
        if isinstance(message, Pong):
            worker.pong = message
            worker.is_serving = message.state == "serving"
        elif isinstance(message, Ready):
            worker.is_serving = True
        elif isinstance(message, Leaving):
            worker.left = message.reason
            self._shared.changed.notify_all()
        request_id = getattr(message, "request_id", 0)
        return self._shared.futures.pop((worker_id, request_id), None)

    def _admit(self, identity: bytes, join: Join) -> Welcome | Refused:
        with self._shared.changed:
            if join.worker_id not in self._expected or join.worker_id in self._shared.workers:
                return Refused(join.request_id, "unknown_worker", f"no stage waits for a worker {join.worker_id!r}")
            if join.glmpipe_version != VERSION:
                text = f"worker {join.worker_id} runs glmpipe {join.glmpipe_version}, the coordinator {VERSION}"
                return Refused(join.request_id, "version", f"{text}: install the same version on both")
            self._shared.workers[join.worker_id] = _Worker(self._router, identity, join)
            self._shared.changed.notify_all()
        return self._welcome(join)

    def _admit_other(self, identity: bytes, key: str, join: Join) -> Welcome | Refused:
        """A worker of another host: who it is says its key, not what it calls itself."""
        assert self._door is not None
        try:
            name = self._door.admit(key, join.token)
        except SecurityError as error:
            return self._refuse(join, "token", str(error))
        if name is None:
            text = "this token is wrong, used or too old: take the one that launch prints now"
            return Refused(join.request_id, "token" if join.token else "unknown_key", text)
        join = with_changes(join, host=name, token=None)
        if join.glmpipe_version != VERSION:
            text = f"worker {join.worker_id} of {name} runs glmpipe {join.glmpipe_version}, the coordinator {VERSION}"
            return self._refuse(join, "version", f"{text}: install the same version on both")
        with self._shared.changed:
            worker_id = self._seat_of(key, join)
            if worker_id is None:
                devices = ", ".join(seat.device for seat in self._seats if seat.host == name) or "no device"
                text = f"no stage waits for {join.device} of {name}; the plan has {devices} there, if not taken already"
                return Refused(join.request_id, "no_seat", text)
            known = self._shared.workers.get(worker_id)
            if known is not None and known.join.public_key == join.public_key:
                known.router, known.identity, known.silent_s = self._routers[1], identity, 0.0
            else:
                self._shared.workers[worker_id] = _Worker(self._routers[1], identity, join, key)
            self._shared.changed.notify_all()
        return self._welcome(join)

    def _seat_of(self, key: str, join: Join) -> str | None:
        """The seat of a worker that comes again, or else one that is free or was left before it had anything to do."""
        assert self._door is not None
        workers = self._shared.workers
        for worker_id, worker in workers.items():
            if (worker.key, worker.join.public_key) == (key, join.public_key) and worker.left is None:
                return worker_id
        taken = [i for i, w in workers.items() if w.is_assigned or (w.left is None and w.silent_s < SILENCE_LIMIT_S)]
        seat = self._door.seat_for(join.host, join.device, taken)
        return None if seat is None else seat.worker_id

    def _refuse(self, join: Join, code: str, text: str) -> Refused:
        self._on_note(f"refused a worker of {join.host}: {text}")
        return Refused(join.request_id, code, text)

    def _welcome(self, join: Join) -> Welcome:
        return Welcome(join.request_id, self.coordinator_id, HEARTBEAT_INTERVAL_S, ORPHAN_TIMEOUT_S)
