"""All stages as one thing: submit a step at one end, collect its outcome at the other."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq

from coordinator.errors import StepStuck
from protocol.data import Span, Step, StepFailed
from protocol.errors import ProtocolError
from protocol.messages import Plane
from protocol.security import Gatekeeper, KeyPair, be_client, new_key_pair
from protocol.sockets import Socket, bind, connect, data_socket, receive, receive_from, send
from protocol.tensors import RawTensor
from protocol.torch_bridge import from_raw, to_raw
from protocol.wire import decode

_POLL_MS = 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step. `hidden` [num_tokens, hidden_size] is None when a stage failed it.

    Times are seconds of this host's monotonic clock. `hosts` are the stages', None for this one: the stamps of others
    are of clocks that have nothing to do with it.
    """

    message: Step | StepFailed
    hidden: torch.Tensor | None
    submitted_at_s: float
    arrived_at_s: float
    hosts: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class _Submitted:
    at_s: float
    spans: tuple[Span, ...]
    shape: tuple[int, ...]

    def is_answered_by(self, message: Step | StepFailed, tensors: tuple[RawTensor, ...]) -> bool:
        if isinstance(message, StepFailed):
            return True
        return message.spans == self.spans and tensors[0].shape == self.shape


class Pipeline:
    """The coordinator's two ends of the chain of stages.

    `check` is called while waiting and raises when a stage is gone: nothing here waits for what cannot come. With a
    `gatekeeper` the last stage is another host's: only who owns the key `last_public_key` is listened to.
    """

    def __init__(
        self,
        context: "zmq.Context[Socket]",
        return_endpoint: str,
        check: Callable[[], None],
        *,
        gatekeeper: Gatekeeper | None = None,
        hosts: tuple[str | None, ...] = (),
    ) -> None:
        self._context = context
        self.keys: KeyPair = new_key_pair()
        self.last_public_key = ""
        self.is_guarded = gatekeeper is not None
        self.hosts = hosts
        self._push = data_socket(context, zmq.PUSH)
        self._pull = data_socket(context, zmq.PULL)
        if gatekeeper is not None:
            gatekeeper.guard(self._pull, self.keys, "return", lambda key: key == self.last_public_key, may_retry=True)
        self._check = check
        self._submitted: dict[int, _Submitted] = {}
        try:
            self.return_endpoint = bind(self._pull, return_endpoint)
        except BaseException:
            self.close()
            raise

    def connect(self, first_stage_endpoint: str, first_public_key: str | None = None) -> None:
        """Aim at the first stage, which may be another one than before: what was not sent yet is dropped.

        It demands keys where its own is given.
        """
        self._push.close(linger=0)
        self._push = data_socket(self._context, zmq.PUSH)
        self._submitted.clear()
        if first_public_key is not None:
            be_client(self._push, self.keys, first_public_key)
        connect(self._push, first_stage_endpoint)

    def submit(self, step: Step, hidden: torch.Tensor) -> None:
        """Send a step down the chain; waits, watching the stages' health, where the first queue is full."""
        _Waiting(self._check).until(self._push, zmq.POLLOUT)
        self._submitted[step.step_id] = _Submitted(time.monotonic(), step.spans, tuple(hidden.shape))
        send(self._push, step, (to_raw(hidden),))

    def collect(self, epoch: int, patience_s: float | None = None) -> Outcome:
        """The next outcome of this epoch, in the order of submission.

        What is malformed, of another epoch, or answers no step under way as a stage would is dropped.

        Raises:
            StepStuck: none came for `patience_s` seconds, although all stages live.
        """
        waiting = _Waiting(self._check, patience_s)
        waiting.until(self._pull, zmq.POLLIN)
        while (outcome := self._take(epoch)) is None:
            waiting.go_on()
            waiting.until(self._pull, zmq.POLLIN)
        return outcome

    def close(self) -> None:
        """Close both sockets; steps under way are dropped."""
        self._push.close(linger=0)
        self._pull.close(linger=0)

    def _take(self, epoch: int) -> Outcome | None:
        """What arrived, if it is an outcome."""
        sender, frames = receive_from(self._pull) if self.is_guarded else ("", receive(self._pull))
        if sender != self.last_public_key:
            return None
        arrived_at_s = time.monotonic()
        try:
            message, tensors = decode(frames, Plane.DATA)
        except ProtocolError:
            return None
        assert isinstance(message, Step | StepFailed)
        submitted = self._submitted.get(message.step_id)
        if submitted is None or message.epoch != epoch or not submitted.is_answered_by(message, tensors):
            return None
        del self._submitted[message.step_id]
        hidden = from_raw(tensors[0]) if isinstance(message, Step) else None
        return Outcome(message, hidden, submitted.at_s, arrived_at_s, self.hosts)


class _Waiting:
    """For one thing, however much else comes meanwhile; `check` is called again and again, and may raise."""

    def __init__(self, check: Callable[[], None], limit_s: float | None = None) -> None:
        self._check = check
        self._limit_s = limit_s
        self._waited_s = 0.0
        self._since_s = time.monotonic()

    def until(self, socket: Socket, event: int) -> None:
        """Wait until the socket is ready. Raises StepStuck once all the waiting has taken longer than the limit."""
        while not socket.poll(_POLL_MS, event):
            self.go_on()

    def go_on(self) -> None:
        """Nothing came, or nothing of use: look whether to wait on. Raises StepStuck, see `until`."""
        self._check()
        now_s = time.monotonic()
        self._waited_s += min(
            now_s - self._since_s, _POLL_MS / 1000
        )  # not all time passed: this process may be stopped
        self._since_s = now_s
        if self._limit_s is not None and self._waited_s > self._limit_s:
            raise StepStuck(f"no stage answered for {self._waited_s:.0f} s, far longer than such steps took before")
