"""The coordinator's side of the control plane: who joined, requests with deadlines, heartbeats.

One thread owns the ROUTER; everybody else talks to it through `ControlPlane`, whose methods may be called from any
thread and never wait without a deadline.
"""

import contextlib
import dataclasses
import itertools
import queue
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
from coordinator.errors import LaunchError, StageLost
from protocol.control import Failed, Join, Leaving, Ping, Pong, Progress, Refused, Welcome
from protocol.errors import ProtocolError
from protocol.messages import Message, Plane
from protocol.sockets import Socket, bind, control_socket
from protocol.tensors import RawTensor
from protocol.version import VERSION
from protocol.wire import Frame, decode, encode

HEARTBEAT_INTERVAL_S = 1.0
SILENCE_LIMIT_S = 2.8
"""A serving worker that answered no ping for so long counts as lost. Its control thread answers during long steps."""
LOADING_SILENCE_LIMIT_S = 15.0
"""The same for one that starts or loads, when a disk or a whole machine may be stuck for a while."""
ORPHAN_TIMEOUT_S = 20.0
"""A worker that hears nothing from its coordinator for so long leaves."""

Reply = tuple[Message, tuple[RawTensor, ...]]
ProgressSink = Callable[[str, Progress], None]


@dataclass(slots=True)
class _Worker:
    identity: bytes
    join: Join
    silent_s: float = 0.0
    pong: Pong | None = None
    left: str | None = None


@dataclass(slots=True)
class _Shared:
    """What the thread and its callers share, guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    workers: dict[str, _Worker] = field(default_factory=dict)
    futures: dict[int, Future[Reply]] = field(default_factory=dict)


class ControlPlane(Closing):
    """Joined workers by id. A context manager; `close` ends the thread and its socket.

    Only the ids in `expected` may join, each once, and only with this version of glmpipe.
    """

    def __init__(
        self,
        context: "zmq.Context[Socket]",
        endpoint: str,
        expected: Iterable[str],
        *,
        on_progress: ProgressSink | None = None,
    ) -> None:
        self._expected = frozenset(expected)
        self._on_progress = on_progress
        self._shared = _Shared()
        self._request_ids = itertools.count(1)
        self._outgoing: queue.SimpleQueue[list[Frame] | None] = queue.SimpleQueue()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._router = control_socket(context, zmq.ROUTER)
        self.endpoint = bind(self._router, endpoint)
        self._thread = threading.Thread(target=self._run, name="control-plane", daemon=True)
        self._thread.start()

    def wait_for_joins(self, deadline_s: float, check: Callable[[], None]) -> dict[str, Join]:
        """Block until every expected worker joined; `check` runs every 0.1 s and may raise.

        Raises:
            LaunchError: some have not within `deadline_s` seconds.
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
            if time.monotonic() > give_up_at:
                absent = ", ".join(sorted(self._expected - joined.keys()))
                raise LaunchError(f"{absent} did not join within {deadline_s:.0f} s; look at its log lines above")

    def begin(self, worker_id: str, message: Any) -> "Future[Reply]":
        """Send a request (its request_id is chosen here); the future holds the reply.

        Raises:
            ProtocolError: the message cannot travel, such as a path that is not valid unicode.
        """
        request_id = next(self._request_ids)
        frames = encode(dataclasses.replace(message, request_id=request_id))
        future: Future[Reply] = Future()
        with self._shared.changed:
            self._shared.futures[request_id] = future
            identity = self._shared.workers[worker_id].identity
        self._outgoing.put([identity, *frames])
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
                is_serving = worker.pong is not None and worker.pong.state == "serving"
                if worker.left is not None:
                    found[worker_id] = f"left: {worker.left}"
                elif worker.silent_s > (SILENCE_LIMIT_S if is_serving else LOADING_SILENCE_LIMIT_S):
                    found[worker_id] = f"has been silent for {worker.silent_s:.1f} s"
        return found

    def forget(self, worker_id: str) -> None:
        """Another worker may join under this id; nothing the old one says is heard any more."""
        with self._shared.changed:
            self._shared.workers.pop(worker_id, None)

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

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"!")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
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
                if self._router in ready:
                    self._receive()
                if time.monotonic() >= next_ping_s:
                    self._ping_all()
                    next_ping_s = time.monotonic() + HEARTBEAT_INTERVAL_S
        finally:
            self._router.close()

    def _send_outgoing(self) -> bool:
        """Send what was posted; false when asked to end."""
        with contextlib.suppress(queue.Empty):
            while True:
                frames = self._outgoing.get_nowait()
                if frames is None:
                    return False
                self._router.send_multipart(frames)
        return True

    def _ping_all(self) -> None:
        with self._shared.changed:
            identities = [w.identity for w in self._shared.workers.values() if w.left is None]
        for identity in identities:
            self._router.send_multipart([identity, *encode(Ping(request_id=0))])

    def _count_silence(self, waited_s: float) -> None:
        """Add up time spent waiting, not time passed: a launch that was itself stopped listens before it judges."""
        with self._shared.changed:
            for worker in self._shared.workers.values():
                worker.silent_s += min(waited_s, HEARTBEAT_INTERVAL_S)

    def _receive(self) -> None:
        identity, *frames = self._router.recv_multipart()
        try:
            message, tensors = decode(frames, Plane.CONTROL)
        except ProtocolError:
            return  # whoever sent this is no worker of ours; a worker's own silence is noticed by its heartbeat
        if isinstance(message, Join):
            self._router.send_multipart([identity, *encode(self._admit(identity, message))])
            return
        with self._shared.changed:
            found = next(((i, w) for i, w in self._shared.workers.items() if w.identity == identity), None)
            if found is None:
                return
            worker_id, worker = found
            worker.silent_s = 0.0
            future = self._note(worker, message)
        if isinstance(message, Progress) and self._on_progress is not None:
            # A sink that fails must not end this thread: all workers would seem silent.
            with contextlib.suppress(Exception):
                self._on_progress(worker_id, message)
        if future is not None:
            future.set_result((message, tensors))

    def _note(self, worker: _Worker, message: Message) -> "Future[Reply] | None":
        """Take in what a worker said; returns the future that waits for it."""
        if isinstance(message, Pong):
            worker.pong = message
        elif isinstance(message, Leaving):
            worker.left = message.reason
            self._shared.changed.notify_all()
        request_id = getattr(message, "request_id", 0)
        return self._shared.futures.pop(request_id, None) if request_id else None

    def _admit(self, identity: bytes, join: Join) -> Welcome | Refused:
        with self._shared.changed:
            if join.worker_id not in self._expected or join.worker_id in self._shared.workers:
                return Refused(join.request_id, "unknown_worker", f"no stage waits for a worker {join.worker_id!r}")
            if join.glmpipe_version != VERSION:
                text = f"worker {join.worker_id} runs glmpipe {join.glmpipe_version}, the coordinator {VERSION}"
                return Refused(join.request_id, "version", f"{text}: install the same version on both")
            self._shared.workers[join.worker_id] = _Worker(identity, join)
            self._shared.changed.notify_all()
        return Welcome(join.request_id, "coordinator", HEARTBEAT_INTERVAL_S, ORPHAN_TIMEOUT_S)


def expect(reply: Reply, wanted: type[Message], who: str) -> Reply:
    """The reply if it is of the wanted type.

    Raises:
        LaunchError: the worker answered Failed, with its words, or something else.
    """
    message = reply[0]
    if isinstance(message, Failed):
        raise LaunchError(f"{who}: {message.text}")
    if not isinstance(message, wanted):
        raise LaunchError(f"{who} answered {type(message).__name__} where {wanted.__name__} was due")
    return reply
