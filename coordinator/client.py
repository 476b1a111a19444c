"""Talks to a running `glmpipe launch` in place of a model of one's own."""

import contextlib
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from coordinator.batch import Ended, Progress, Request
from coordinator.closing import Closing
from coordinator.conversation import Prompt
from coordinator.errors import ClosedError, ConnectError, CoordinatorError, GenerationError, PromptTooLong, StageLost
from coordinator.legible import legible
from coordinator.runtime_dir import is_deserted
from coordinator.talking import Talking
from coordinator.which_launch import FIND_S, endpoint_faults_as_usage, endpoint_of
from glm.logprobs import TokenLogprob
from glm.sampling_params import seed_after
from protocol import sockets
from protocol.client import (
    NOT_SERVING,
    PROMPT_TOO_LONG,
    Cancel,
    ClientMessage,
    Delta,
    Describe,
    Description,
    Error,
    Finished,
    Generate,
    Queued,
    SamplingParams,
)
from protocol.client import TokenLogprob as WireLogprob
from protocol.endpoints import ipc_path
from protocol.errors import ProtocolError
from protocol.limits import NO_CHANCE
from protocol.messages import Plane
from protocol.records import with_changes
from protocol.wire import decode

CONNECT_DEADLINE_S = 10.0
"""How long a launch may take to say what it is; it answers between two steps, and a long prompt is one step."""
CANCEL_DEADLINE_S = 60.0
"""How long a cancelled answer may go on before it is given up."""
SILENCE_DEADLINE_S = 3600.0
"""How long a launch may compute without a word: a long prompt on a slow machine takes minutes."""
WAITING_NOTE_S = 10.0
"""How often it is said what a launch waits for that still loads."""
_ASK_AGAIN_S = 0.5
_POLL_MS = 100
_SHARED_POLL_MS = 5
"""Where several threads listen on one socket, by turns."""


def connect(
    endpoint: str | None = None,
    *,
    deadline_s: float = CONNECT_DEADLINE_S,
    on_waiting: Callable[[str], None] = lambda _: None,
) -> "RemoteBackend":
    """Connect to the launch that `endpoint` means, see `endpoint_of`.

    One that is still loading is waited for as long as it says so; `on_waiting` hears now and then what that waits for.

    Raises:
        ConnectError: there is none, or it does not answer within the deadline. UsageError: several could be meant,
            or the endpoint is not one glmpipe uses.
    """
    backend = RemoteBackend(endpoint_of(endpoint))
    try:
        with endpoint_faults_as_usage():
            backend.greet(deadline_s, on_waiting)
    except BaseException:
        backend.close()
        raise
    return backend


def _as_exception(error: Error) -> CoordinatorError:
    """A lost stage ends the launch; whatever else failed, failed for this request only."""
    if error.code == StageLost.__name__:
        return StageLost(error.text)
    return PromptTooLong(error.text) if error.code == PROMPT_TOO_LONG else GenerationError(error.text)


def _ended(message: Finished | Error, logprobs: list[TokenLogprob] | None) -> Ended:
    """Raises StageLost where the whole launch ends."""
    if isinstance(message, Finished):
        return Ended(message.request_id, message, None, None if logprobs is None else tuple(logprobs))
    error = _as_exception(message)
    if isinstance(error, StageLost):
        raise error
    return Ended(message.request_id, None, str(error))


def _from_wire(logprob: WireLogprob) -> TokenLogprob:
    """What stands for no chance at all on the wire is minus infinity again."""
    top = tuple((each.token_id, _chance(each.logprob)) for each in logprob.top)
    return TokenLogprob(logprob.token_id, _chance(logprob.logprob), top)


def _chance(logprob: float) -> float:
    return logprob if logprob > NO_CHANCE else -math.inf


class RemoteBackend(Talking, Closing):
    """A running launch, as a `ChatBackend` (streamed) and as a `BatchBackend` (many at once); asked as `Talking` says.

    A context manager; made by `connect`. Several threads may stream at once; while answers that `submit` opened are
    under way, nothing is to be streamed. What was closed raises ClosedError.
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._context: zmq.Context[sockets.Socket] = zmq.Context()
        self._open_socket()
        self._request_ids = itertools.count(1)
        self._lock = threading.RLock()
        self._is_closed = False
        self._inboxes: dict[int, deque[ClientMessage]] = {}
        """What has come for streams, while others of them were listening, by request id."""
        self._cancels: list[threading.Event] = []
        self._description: Description | None = None
        self.on_queued: Callable[[int, str | None], None] | None = None
        """Told its place whenever a request waits for room at the launch, 1 is next; and what that itself waits for."""
        self._open: dict[int, list[TokenLogprob] | None] = {}
        self._heard_at_s = 0.0

    def greet(self, deadline_s: float, on_waiting: Callable[[str], None] = lambda _: None) -> None:
        """Connect and learn what the launch is. Raises ConnectError when it has said nothing for `deadline_s`."""
        sockets.connect(self._socket, self.endpoint)
        request_id = next(self._request_ids)
        self._send(Describe(request_id))
        until_s = time.monotonic() + deadline_s
        told_at_s = -math.inf
        while time.monotonic() < until_s:
            message = self._receive()
            if isinstance(message, Description) and message.request_id == request_id:
                self._description = message
                return
            if isinstance(message, Error) and (message.request_id, message.code) == (request_id, NOT_SERVING):
                if time.monotonic() >= told_at_s + WAITING_NOTE_S:
                    told_at_s = time.monotonic()
                    on_waiting(message.text)
                time.sleep(_ASK_AGAIN_S)
                until_s = time.monotonic() + deadline_s
                self._send(Describe(request_id))
        raise ConnectError(
            f"nobody answered at {self.endpoint} within {deadline_s:g} s: the launch has ended, is of another glmpipe "
            "release, or is busy with a long prompt (then try again later)"
        )

    def reconnect(
        self, name: str | None = None, *, patient: bool = True, on_waiting: Callable[[str], None] = lambda _: None
    ) -> None:
        """See `Reconnecting`. Where it fails, the backend is as it was, and this can be tried again."""
        endpoint = self.endpoint
        if name is not None or self._is_gone():
            endpoint = endpoint_of(name, find_s=FIND_S if patient else 0.0)
        self._close_socket()
        self.endpoint = endpoint
        self._open_socket()
        self._open = {}
        self.greet(CONNECT_DEADLINE_S, on_waiting)

    def describe(self) -> Description:
        """What the launch said when the connection was made; a launch keeps its model and plan."""
        assert self._description is not None
        return self._description

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
        """See `ChatBackend`.

        Raises:
            GenerationError: the launch refused or failed this request, or did not end it after a cancel.
            StageLost: the launch ends because a stage is gone.
            ConnectError: the launch is gone, or has been silent for too long.
        """
        request_id, cancelled, is_over = next(self._request_ids), threading.Event(), False
        self._inboxes[request_id] = deque()
        self._cancels.append(cancelled)
        try:
            self._ask(prompt, sampling, request_id=request_id)
            for message in self._answers(request_id, cancelled):
                is_over = isinstance(message, Finished | Error)
                if isinstance(message, Error):
                    raise _as_exception(message)
                yield message
        finally:
            self._cancels.remove(cancelled)
            del self._inboxes[request_id]
            if not is_over:
                with contextlib.suppress(ConnectError, ClosedError):
                    self._send(Cancel(request_id))

    def submit(self, request: Request) -> list[int]:
        """See `BatchBackend`. Raises GenerationError when the launch could not take it."""
        if not self._open:
            self._heard_at_s = time.monotonic()
        tickets = []
        for index in range(request.num_answers):
            sampling = with_changes(request.sampling, seed=seed_after(request.sampling.seed, index))
            tickets.append(self._ask(request.prompt, sampling, request.num_logprobs))
            self._open[tickets[-1]] = None if request.num_logprobs is None else []
        return tickets

    def poll(self) -> Progress:
        """See `BatchBackend`: waits a moment for the first message, then takes what else is there.

        Raises:
            StageLost: the launch ends because a stage is gone. ConnectError: the launch is gone, or has been silent
            for too long.
        """
        num_new_tokens, ended = 0, []
        message = self._receive()
        if message is None and time.monotonic() > self._heard_at_s + SILENCE_DEADLINE_S:
            raise ConnectError(
                f"the launch at {self.endpoint} said nothing for {SILENCE_DEADLINE_S:g} s: it seems stuck"
            )
        while message is not None:
            self._heard_at_s = time.monotonic()
            if isinstance(message, Delta) and message.request_id in self._open:
                num_new_tokens += len(message.token_ids)
                logprobs = self._open[message.request_id]
                if logprobs is not None:
                    logprobs += map(_from_wire, message.logprobs)
            elif isinstance(message, Finished | Error) and message.request_id in self._open:
                ended.append(_ended(message, self._open.pop(message.request_id)))
            message = self._receive() if self._socket.poll(0) else None
        return Progress(num_new_tokens, tuple(ended))

    def drop(self) -> None:
        """See `BatchBackend`; nothing of these answers comes any more."""
        dropped, self._open = self._open, {}
        for ticket in dropped:
            self._send(Cancel(ticket))

    def cancel(self) -> None:
        """Stop the answers being streamed. Safe in a signal handler and in another thread."""
        for cancelled in tuple(self._cancels):
            cancelled.set()

    def close(self) -> None:
        """Let go of the launch, which goes on. Safe to call twice, and while other threads wait for answers."""
        self._is_closed = True
        with self._lock:
            self._close_socket()
            self._context.term()

    def _is_gone(self) -> bool:
        path = ipc_path(self.endpoint)
        return path is not None and is_deserted(Path(path))

    def _open_socket(self) -> None:
        self._socket = sockets.client_socket(self._context, zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def _close_socket(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close()

    def _ask(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        num_logprobs: int | None = None,
        request_id: int | None = None,
    ) -> int:
        request_id = next(self._request_ids) if request_id is None else request_id
        try:
            self._send(Generate(request_id, prompt, sampling, num_logprobs))
        except ProtocolError as error:
            raise GenerationError(f"the launch could not take this request: {error}") from error
        return request_id

    def _answers(self, request_id: int, cancelled: threading.Event) -> Iterator[Delta | Finished | Error]:
        """What the launch sends for one request, up to its end; a cancel is passed on once, when it is asked for."""
        until_s = time.monotonic() + SILENCE_DEADLINE_S
        was_cancelled = False
        while time.monotonic() < until_s:
            if cancelled.is_set() and not was_cancelled:
                was_cancelled = True
                until_s = time.monotonic() + CANCEL_DEADLINE_S
                self._send(Cancel(request_id))
            message = self._hear(request_id)
            if isinstance(message, Queued) and message.request_id == request_id and self.on_queued is not None:
                self.on_queued(message.position, message.waits_for)
            if not isinstance(message, Delta | Finished | Error) or message.request_id != request_id:
                continue
            if not was_cancelled:
                until_s = time.monotonic() + SILENCE_DEADLINE_S
            yield message
            if not isinstance(message, Delta):
                return
        if was_cancelled:
            raise GenerationError(f"the launch did not stop within {CANCEL_DEADLINE_S:g} s; its answer is given up")
        raise ConnectError(f"the launch at {self.endpoint} said nothing for {SILENCE_DEADLINE_S:g} s: it seems stuck")

    def _hear(self, request_id: int) -> ClientMessage | None:
        """The next message for one of several streams; None after a short while. One thread listens for all of them."""
        inbox = self._inboxes[request_id]
        if inbox or not self._lock.acquire(timeout=_POLL_MS / 1000):
            return inbox.popleft() if inbox else None
        try:
            if inbox:
                return inbox.popleft()
            message = self._receive(_POLL_MS if len(self._inboxes) == 1 else _SHARED_POLL_MS)
        finally:
            self._lock.release()
        if message is None or message.request_id == request_id:
            return message
        if message.request_id in self._inboxes:
            self._inboxes[message.request_id].append(message)
        return None

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"the connection to the launch at {self.endpoint} was closed: connect again")

    def _send(self, message: ClientMessage) -> None:
        try:
            with self._lock:
                self._check_open()
                sockets.send(self._socket, message, flags=zmq.NOBLOCK)
        except zmq.Again:
            raise ConnectError(f"the launch at {self.endpoint} takes no messages any more: it seems stuck") from None

    def _receive(self, poll_ms: int = _POLL_MS) -> ClientMessage | None:
        """The next message, or None after a short while without one. Raises ConnectError when the launch is gone."""
        self._check_open()
        if self._socket.poll(poll_ms):
            message, _ = decode(sockets.receive(self._socket), Plane.CLIENT)
            return legible(message) if isinstance(message, Description | Queued) else cast(ClientMessage, message)
        if self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            raise ConnectError(f"the launch at {self.endpoint} is gone: its terminal says why")
        return None
