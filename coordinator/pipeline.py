"""All stages as one thing: submit a step at one end, collect its outcome at the other."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq

from coordinator.errors import StageLost, StepStuck
from coordinator.legible import legible
from coordinator.signals import signals_deferred
from coordinator.stamps import believable
from protocol.data import Span, Step, StepFailed
from protocol.errors import ProtocolError
from protocol.flood_guard import Inflow
from protocol.messages import Plane
from protocol.records import with_changes
from protocol.security import Gatekeeper, KeyPair, be_client, new_key_pair
from protocol.sockets import Socket, bind, connect, data_inflow_bytes, data_socket, receive, receive_from, send
from protocol.tensors import RawTensor
from protocol.torch_bridge import from_raw, to_raw
from protocol.wire import decode

PROBE_STEP_ID = 1
"""Of the empty step by which the way is tried in each epoch."""
FIRST_STEP_ID = PROBE_STEP_ID + 1
_POLL_MS = 100
Limit = Callable[[], float]
"""Seconds; asked for only while there is nothing to do but wait."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step. `hidden` [num_tokens, hidden_size] is None when a stage failed it.

    Times are seconds of this host's monotonic clock. `hosts` are the stages', None for this one: the stamps of others
    are of clocks that have nothing to do with it. `took_s` leaves out what this process stood still for.
    """

    message: Step | StepFailed
    hidden: torch.Tensor | None
    submitted_at_s: float
    arrived_at_s: float
    hosts: tuple[str | None, ...] = ()
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Submitted:
    at_s: float
    stood_still_s: float
    spans: tuple[Span, ...]
    shape: tuple[int, ...]

    def fault(self, message: Step | StepFailed, tensors: tuple[RawTensor, ...], num_stages: int) -> str | None:
        """Why this cannot be what became of the step."""
        if isinstance(message, StepFailed):
            failed = f"it failed in stage {message.stage_index + 1}, and there are {num_stages}"
            return failed if message.stage_index >= num_stages else None
        if message.spans != self.spans:
            return "it has other spans than were sent"
        if tensors[0].shape != self.shape:
            return f"its hidden states are {list(tensors[0].shape)}, {list(self.shape)} were sent"
        return None


class Pipeline:
    """The coordinator's two ends of the chain of stages.

    `check` is called while waiting and raises when a stage is gone: nothing here waits for what cannot come. With a
    `gatekeeper` stages may be other hosts'. `is_guarded`: the last one is, and only who owns the key
    `last_public_key` is listened to.
    """

    def __init__(
        self,
        context: "zmq.Context[Socket]",
        return_endpoint: str,
        check: Callable[[], None],
        *,
        gatekeeper: Gatekeeper | None = None,
        is_guarded: bool = False,
        hosts: tuple[str | None, ...],
    ) -> None:
        self._context = context
        self.keys: KeyPair = new_key_pair()
        self.last_public_key = ""
        self.is_guarded = is_guarded
        self.hosts = hosts
        """Of the stages, which are as many."""
        self.most_kv_tokens = sys.maxsize
        """What any stage may hold."""
        self.objection: str | None = None
        """Why the latest answer to a step under way was not taken."""
        self._push = data_socket(context, zmq.PUSH)
        self._pull = data_socket(context, zmq.PULL)
        self._inflow = Inflow(data_inflow_bytes(len(hosts)))
        self._backflow = None if gatekeeper is None else gatekeeper.expect_nothing("first")
        if is_guarded:
            assert gatekeeper is not None
            gatekeeper.guard(
                self._pull,
                self.keys,
                "return",
                lambda key: key == self.last_public_key,
                may_retry=True,
                inflow=self._inflow,
            )
        self._check = check
        self.look: Callable[[], None] = lambda: None
        """As `check`, but only while nothing at all has come back."""
        self._stood_still_s = 0.0
        self._submitted: dict[int, _Submitted] = {}
        self.num_sent = 0
        """Steps that the stages were given since they were connected to."""
        self.took_nothing = False
        """Whether a step could not even be sent."""
        try:
            self.return_endpoint = bind(self._pull, return_endpoint)
            self._inflow.listens_at(self.return_endpoint)
        except BaseException:
            self.close()
            raise

    def connect(self, first_stage_endpoint: str, first_public_key: str | None = None) -> None:
        """Aim at the first stage, which may be another one than before: what was not sent yet is dropped.

        It demands keys where its own is given. Raises StageLost for an address or a key that nobody can have.
        """
        self._submitted.clear()
        self.num_sent, self.took_nothing, self.objection = 0, False, None
        self._push.close(linger=0)
        try:
            self._push = data_socket(self._context, zmq.PUSH)
            if first_public_key is not None:
                be_client(self._push, self.keys, first_public_key)
            if self._backflow is not None:
                self._backflow.leads_to(first_stage_endpoint)
            connect(self._push, first_stage_endpoint)
        except ProtocolError as error:
            raise StageLost(f"stage 1 cannot be connected to: {error}") from None

    def submit(
        self,
        step: Step,
        hidden: torch.Tensor,
        limit_s: Limit | None = None,
        *,
        sent: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a step down the chain; waits, watching the stages' health, where the first queue is full or not there.

        It is sent whole, and `sent` called behind it, whatever interrupts: the first frame of one must not begin the
        next, and what is on its way must be known.

        Raises:
            StepStuck: it took nothing for `limit_s()` seconds, although all stages live.
        """
        waiting = _Waiting(self._check, limit_s, "the first stage took no step")
        try:
            waiting.until(self._push, zmq.POLLOUT)
        except StepStuck:
            self.took_nothing = True
            raise
        self._stood_still_s += waiting.stood_still_s
        submitted = _Submitted(time.monotonic(), self._stood_still_s, step.spans, tuple(hidden.shape))
        with signals_deferred():
            self._submitted[step.step_id] = submitted
            self.num_sent += 1
            send(self._push, step, (to_raw(hidden),))
            sent()

    def collect(self, epoch: int, limit_s: Limit | None = None) -> Outcome:
        """The next outcome of this epoch, in the order of submission.

        What is malformed, of another epoch, or answers no step under way as a stage would is dropped.

        Raises:
            StepStuck: none came for `limit_s()` seconds, although all stages live.
        """
        waiting = _Waiting(self._check_and_look, limit_s, "no stage answered")
        waiting.until(self._pull, zmq.POLLIN)
        while (taken := self._take(epoch)) is None:
            waiting.go_on()
            waiting.until(self._pull, zmq.POLLIN)
        self._stood_still_s += waiting.stood_still_s
        message, hidden, submitted, arrived_at_s = taken
        took_s = arrived_at_s - submitted.at_s - (self._stood_still_s - submitted.stood_still_s)
        return Outcome(message, hidden, submitted.at_s, arrived_at_s, self.hosts, max(0.0, took_s))

    @property
    def num_back(self) -> int:
        """How many of the steps sent have come back."""
        return self.num_sent - len(self._submitted)

    @property
    def bytes_under_way(self) -> int:
        """Of hidden states, at most."""
        return sum(math.prod(step.shape) * torch.float32.itemsize for step in self._submitted.values())

    def _check_and_look(self) -> None:
        self._check()
        self.look()

    def close(self) -> None:
        """Close both sockets; steps under way are dropped."""
        self._push.close(linger=0)
        self._pull.close(linger=0)

    def _take(self, epoch: int) -> "tuple[Step | StepFailed, torch.Tensor | None, _Submitted, float] | None":
        """What arrived, if it is an outcome, and when."""
        sender = ""
        try:
            if self.is_guarded:
                sender, frames = receive_from(self._pull, self._inflow, zmq.NOBLOCK)
            else:
                frames = receive(self._pull, zmq.NOBLOCK)
        except zmq.Again:  # a guarded socket can be said to be ready and have nothing
            return None
        if sender != self.last_public_key:
            return None
        arrived_at_s = time.monotonic()
        try:
            message, tensors = decode(frames, Plane.DATA)
        except ProtocolError:
            return None
        assert isinstance(message, Step | StepFailed)
        submitted = self._submitted.get(message.step_id)
        if submitted is None or message.epoch != epoch:
            return None
        told = believable(message.timings, self.hosts, self.most_kv_tokens, submitted.at_s, arrived_at_s)
        fault = submitted.fault(message, tensors, len(self.hosts))
        if told is None or fault is not None:
            self.objection = fault or f"its timings are not those of the {len(self.hosts)} stages"
            return None
        del self._submitted[message.step_id]
        hidden = from_raw(tensors[0]) if isinstance(message, Step) else None
        message = with_changes(message, timings=told)
        if isinstance(message, StepFailed):
            message = legible(message)
        return message, hidden, submitted, arrived_at_s


class _Waiting:
    """For one thing, however much else comes meanwhile; `check` is called again and again, and may raise.

    Not all time that passes was waited: this process may be stopped. The rest is `stood_still_s`.
    """

    def __init__(self, check: Callable[[], None], limit_s: Limit | None, what: str) -> None:
        self._check = check
        self._limit_s = limit_s
        self._what = what
        self._waited_s = 0.0
        self._since_s = time.monotonic()
        self.stood_still_s = 0.0

    def until(self, socket: Socket, event: int) -> None:
        """Wait until the socket is ready. Raises StepStuck once all the waiting has taken longer than the limit."""
        while not socket.poll(_POLL_MS, event):
            self.go_on()
        self._count()

    def go_on(self) -> None:
        """Nothing came, or nothing of use: look whether to wait on. Raises StepStuck, see `until`."""
        self._check()
        self._count()
        if self._limit_s is not None and self._waited_s > self._limit_s():
            raise StepStuck(f"{self._what} for {self._waited_s:.0f} s, far longer than such steps took before")

    def _count(self) -> None:
        now_s = time.monotonic()
        passed_s, self._since_s = now_s - self._since_s, now_s
        self._waited_s += min(passed_s, _POLL_MS / 1000)
        self.stood_still_s += max(0.0, passed_s - _POLL_MS / 1000)
