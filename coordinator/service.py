"""Serves a chat model to the programs that connect to a running launch: many requests, one loop."""

import logging
from collections import deque
from collections.abc import Callable

import zmq

from coordinator.answer import Answer
from coordinator.chat_model import ChatModel
from coordinator.errors import CoordinatorError, GenerationError
from coordinator.reception import Reception
from coordinator.request_log import RequestLog
from glm.errors import GlmError
from protocol import client
from protocol.errors import ProtocolError
from protocol.limits import clip_text
from protocol.messages import Message, Plane
from protocol.records import with_changes
from protocol.sockets import Socket
from protocol.wire import decode, encode

_IDLE_POLL_MS = 200
_TURN_MESSAGES, _TURN_BYTES = 64, 2**20
_MOST_OPEN = 4096
"""Requests that run or wait."""
_log = logging.getLogger(__name__)


def serve(
    chat_model: ChatModel, endpoint: str, should_stop: Callable[[], bool], requests: RequestLog | None = None
) -> None:
    """Answer clients until `should_stop()`; it is asked between steps and a few times a second.

    `requests` hears of every request; by default nothing is logged of them.

    Raises:
        StageLost: the pipeline is broken; every waiting client has been told.
    """
    with Reception() as reception:
        reception.open(endpoint)
        serve_at(chat_model, reception, should_stop, requests)


def serve_at(
    chat_model: ChatModel, reception: Reception, should_stop: Callable[[], bool], requests: RequestLog | None = None
) -> None:
    """As `serve`, for the clients of a reception that is open already."""
    service = Service(chat_model, reception.hand_over(), requests)
    before = chat_model.cluster.meanwhile
    chat_model.cluster.meanwhile = service.listen
    try:
        service.run(should_stop)
    finally:
        chat_model.cluster.meanwhile = before


class Service:
    """Requests by client and request id; a client may have several at once."""

    def __init__(self, chat_model: ChatModel, router: Socket, requests: RequestLog | None = None) -> None:
        self._chat_model = chat_model
        self._router = router
        self._requests = requests
        self._answers: dict[tuple[bytes, int], Answer] = {}
        self._positions: dict[int, tuple[int, bool]] = {}
        self._owed: deque[tuple[bytes, client.Error]] = deque(maxlen=_MOST_OPEN)
        self._num_malformed = 0

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Take in requests, walk the chain, send what became final; see `serve`."""
        try:
            while not should_stop():
                self._take_in(_IDLE_POLL_MS if not self._answers else 0)
                self._pay()
                if self._answers:
                    self._step()
                else:
                    self._chat_model.supervisor.check()
        except CoordinatorError as error:
            for (identity, request_id), _ in list(self._answers.items()):
                self._fail(identity, request_id, error)
            raise

    def listen(self) -> None:
        """While stages are brought back nothing is computed, but requests are queued, cancelled and told of that."""
        self._take_in(0)
        self._pay()
        self._tell_positions()

    def _take_in(self, poll_ms: int) -> None:
        """What clients said, but only so much of it in one turn: a flood holds up nobody's answer."""
        num_messages = num_bytes = 0
        while num_messages < _TURN_MESSAGES and num_bytes < _TURN_BYTES:
            if not self._router.poll(0 if num_messages else poll_ms):
                return
            num_bytes += self._receive()
            num_messages += 1

    def _receive(self) -> int:
        """Take in one message; returns its size in bytes."""
        identity, *frames = self._router.recv_multipart()
        try:
            message, _ = decode(frames, Plane.CLIENT)
            self._obey(identity, message)
        except ProtocolError as error:
            self._complain(error)
        return sum(map(len, frames))

    def _obey(self, identity: bytes, message: Message) -> None:
        if isinstance(message, client.Generate):
            self._begin(identity, message)
        elif isinstance(message, client.Cancel):
            answer = self._answers.get((identity, message.request_id))
            if answer is not None:
                self._chat_model.engine.cancel(answer.sequence)
                self._finish(identity, answer)
        elif isinstance(message, client.Describe):
            described = self._chat_model.describe()
            self._send(identity, with_changes(described, request_id=message.request_id))

    def _complain(self, error: ProtocolError) -> None:
        """About the first malformed message, the second, the fourth, ...: a flood fills no terminal."""
        self._num_malformed += 1
        if self._num_malformed.bit_count() == 1:
            _log.warning("dropped a malformed message of a client (number %d): %s", self._num_malformed, error)

    def _begin(self, identity: bytes, message: client.Generate) -> None:
        key = (identity, message.request_id)
        try:
            if key in self._answers:
                raise GenerationError(f"request {message.request_id} is already being answered")
            if len(self._answers) >= _MOST_OPEN:
                raise GenerationError(f"{_MOST_OPEN} requests are open already: try again when some are answered")
            self._answers[key] = self._chat_model.begin(
                message.prompt, message.sampling, message.request_id, num_logprobs=message.num_logprobs
            )
        except (CoordinatorError, GlmError) as error:
            self._fail(identity, message.request_id, error)
            return
        if self._requests is not None:
            self._requests.began(identity, message, self._answers[key].sequence.num_prompt)

    def _fail(self, identity: bytes, request_id: int, error: Exception) -> None:
        message = client.Error(request_id, type(error).__name__, clip_text(str(error)))
        self._end(identity, message)

    def _end(self, identity: bytes, message: client.Finished | client.Error) -> None:
        if self._requests is not None:
            self._requests.ended(identity, message)
        self._send(identity, message)

    def _step(self) -> None:
        epoch = self._chat_model.cluster.epoch
        owners = {id(answer): identity for (identity, _), answer in self._answers.items()}
        for answer, delta in self._chat_model.step(list(self._answers.values())):
            self._send(owners[id(answer)], delta)
        if self._chat_model.cluster.epoch == epoch:  # behind a recovery it takes a step to tell who waits
            self._tell_positions()
        for (identity, _), answer in list(self._answers.items()):
            if answer.sequence.is_finished:
                self._finish(identity, answer)

    def _tell_positions(self) -> None:
        """Whoever waits hears its place in the queue, each time it has changed, or what it waits for has."""
        positions: dict[int, tuple[int, bool]] = {}
        waits_for = self._chat_model.waits_for()
        for (identity, request_id), answer in list(self._answers.items()):
            sequence = answer.sequence
            position = self._chat_model.engine.queue_position(sequence)
            if position:
                positions[sequence.sequence_id] = position, waits_for is None
                if positions[sequence.sequence_id] != self._positions.get(sequence.sequence_id):
                    self._send(identity, client.Queued(request_id, position, waits_for))
        self._positions = positions

    def _finish(self, identity: bytes, answer: Answer) -> None:
        if self._answers.pop((identity, answer.request_id), None) is None:
            return  # its client was found gone a moment ago
        error = answer.sequence.error
        if error is not None:
            self._fail(identity, answer.request_id, error)
            return
        tail, finished = answer.close(self._chat_model.engine.pacing.reason())
        if tail is not None:
            self._send(identity, tail)
        self._end(identity, finished)

    def _send(self, identity: bytes, message: client.ClientMessage) -> None:
        """Nobody waits for a client: one that is gone, or does not read, has its answers cancelled."""
        try:
            frames = encode(message)
        except ProtocolError as error:
            text = clip_text(f"the answer cannot be sent: {error}")
            frames = encode(client.Error(message.request_id, "GenerationError", text))
        try:
            self._router.send_multipart([identity, *frames], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            _log.info("a client is gone or does not read: %s", error.strerror)
            for key in [key for key in self._answers if key[0] == identity]:
                self._chat_model.engine.cancel(self._answers.pop(key).sequence)
                if error.errno == zmq.EAGAIN:
                    text = "cancelled: this client did not read its answer"
                    self._owed.append((identity, client.Error(key[1], "GenerationError", text)))

    def _pay(self) -> None:
        """Tell clients that read again what became of their answers."""
        for _ in range(len(self._owed)):
            identity, message = self._owed.popleft()
            try:
                self._router.send_multipart([identity, *encode(message)], flags=zmq.NOBLOCK)
            except zmq.ZMQError as error:
                if error.errno == zmq.EAGAIN:
                    self._owed.append((identity, message))
