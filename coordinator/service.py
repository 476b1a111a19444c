"""Serves a chat model to the programs that connect to a running launch: many requests, one loop."""

import logging
from collections import deque
from collections.abc import Callable

import zmq

from coordinator.answer import Answer
from coordinator.chat_model import ChatModel
from coordinator.closing import Closing
from coordinator.errors import CoordinatorError, GenerationError
from coordinator.prompts import ReadPrompt, takes_long
from coordinator.reading import Reading
from coordinator.reception import Reception
from coordinator.request_log import RequestLog
from glm.errors import GlmError, faults_as
from protocol import client
from protocol.errors import ProtocolError
from protocol.limits import clip_text
from protocol.messages import Message, Plane
from protocol.records import with_changes
from protocol.sockets import Socket
from protocol.wire import decode, encode

_IDLE_POLL_MS = 200
_TURN_MESSAGES, _TURN_BYTES = 64, 2**20
_TURN_POSITIONS = 32
_READING_POLL_S = 0.002
"""How long clients may go unheard while nothing is computed and a prompt is being read."""
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
    before = chat_model.cluster.meanwhile
    with Service(chat_model, reception.hand_over(), requests) as service:
        chat_model.cluster.meanwhile = service.listen
        try:
            service.run(should_stop)
        finally:
            chat_model.cluster.meanwhile = before


Key = tuple[bytes, int]
"""A client's identity, and the id of one of its requests."""


class Service(Closing):
    """Requests by client and request id; a client may have several at once. A context manager.

    What a step costs here does not depend on how many wait: it looks at those that took part in it.
    """

    def __init__(self, chat_model: ChatModel, router: Socket, requests: RequestLog | None = None) -> None:
        self._chat_model = chat_model
        self._router = router
        self._requests = requests
        self._answers: dict[Key, Answer] = {}
        self._by_sequence: dict[int, Answer] = {}
        self._owners: dict[int, bytes] = {}
        """The client's identity, by sequence id."""
        self._reading: Reading[ReadPrompt] = Reading(lambda asked: chat_model.read(asked.prompt, asked.sampling))
        self._being_read: dict[Key, int] = {}
        self._cancelled: set[int] = set()
        """Tickets of what is being read and not wanted any more."""
        self._told: dict[int, tuple[int, bool]] = {}
        self._next_told = 0
        self._owed: deque[tuple[bytes, client.Error]] = deque(maxlen=_MOST_OPEN)
        self._num_malformed = 0

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Take in requests, walk the chain, send what became final; see `serve`."""
        try:
            while not should_stop():
                self._take_in(0 if self._answers or self._being_read else _IDLE_POLL_MS)
                self._take_read(_READING_POLL_S if self._being_read and not self._answers else 0.0)
                self._pay()
                if self._answers:
                    self._step()
                else:
                    self._chat_model.supervisor.check()
        except CoordinatorError as error:
            for identity, request_id in [*self._answers, *self._being_read]:
                self._fail(identity, request_id, error)
            raise

    def close(self) -> None:
        """Read no more prompts."""
        self._reading.close()

    def listen(self) -> None:
        """While stages are brought back nothing is computed, but requests are queued, cancelled and told of that."""
        self._take_in(0)
        self._take_read()
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
            self._cancel((identity, message.request_id))
        elif isinstance(message, client.Describe):
            described = self._chat_model.describe()
            self._send(identity, with_changes(described, request_id=message.request_id))

    def _complain(self, error: ProtocolError) -> None:
        """About the first malformed message, the second, the fourth, ...: a flood fills no terminal."""
        self._num_malformed += 1
        if self._num_malformed.bit_count() == 1:
            _log.warning("dropped a malformed message of a client (number %d): %s", self._num_malformed, error)

    def _begin(self, identity: bytes, message: client.Generate) -> None:
        """Take a request: what takes long to read is read elsewhere, the rest at once."""
        key = (identity, message.request_id)
        try:
            if key in self._answers or key in self._being_read:
                raise GenerationError(f"request {message.request_id} is already being answered")
            if len(self._answers) + len(self._being_read) >= _MOST_OPEN:
                raise GenerationError(f"{_MOST_OPEN} requests are open already: try again when some are answered")
            if takes_long(message.prompt):
                self._being_read[key] = self._reading.add(identity, message)
                return
            with faults_as(GenerationError, "the request could not be read"):
                read = self._chat_model.read(message.prompt, message.sampling)
        except (CoordinatorError, GlmError) as error:
            self._fail(identity, message.request_id, error)
            return
        self._enter(key, message, read)

    def _take_read(self, wait_s: float = 0.0) -> None:
        """Queue what has been read meanwhile; `wait_s` seconds for the first of it."""
        while (read := self._reading.take(wait_s)) is not None:
            wait_s, key = 0.0, (read.identity, read.message.request_id)
            if self._being_read.get(key) != read.ticket:
                continue  # its client was found gone
            del self._being_read[key]
            if isinstance(read.outcome, Exception):
                self._cancelled.discard(read.ticket)
                self._fail(*key, read.outcome)
                continue
            self._enter(key, read.message, read.outcome)
            if read.ticket in self._cancelled:
                self._cancelled.remove(read.ticket)
                self._cancel(key)

    def _enter(self, key: Key, message: client.Generate, read: ReadPrompt) -> None:
        answer = self._chat_model.enter(read, message.request_id, num_logprobs=message.num_logprobs)
        self._answers[key] = self._by_sequence[answer.sequence.sequence_id] = answer
        self._owners[answer.sequence.sequence_id] = key[0]
        if self._requests is not None:
            self._requests.began(key[0], message, answer.sequence.num_prompt)

    def _cancel(self, key: Key) -> None:
        if key in self._being_read:
            self._cancelled.add(self._being_read[key])
        answer = self._answers.get(key)
        if answer is not None:
            self._chat_model.engine.cancel(answer.sequence)
            self._finish(key[0], answer)

    def _forget(self, key: Key) -> Answer | None:
        """It is no longer open; the answer, where there was one."""
        answer = self._answers.pop(key, None)
        if answer is not None:
            for by_sequence in (self._by_sequence, self._owners, self._told):
                by_sequence.pop(answer.sequence.sequence_id, None)
        return answer

    def _fail(self, identity: bytes, request_id: int, error: Exception) -> None:
        message = client.Error(request_id, type(error).__name__, clip_text(str(error)))
        self._end(identity, message)

    def _end(self, identity: bytes, message: client.Finished | client.Error) -> None:
        if self._requests is not None:
            self._requests.ended(identity, message)
        self._send(identity, message)

    def _step(self) -> None:
        epoch = self._chat_model.cluster.epoch
        walked = self._chat_model.walk(self._by_sequence)
        owned = [(self._owners[answer.sequence.sequence_id], answer, delta) for answer, delta in walked]
        for identity, answer, delta in owned:
            self._told.pop(answer.sequence.sequence_id, None)
            if delta is not None:
                self._send(identity, delta)
        if self._chat_model.cluster.epoch == epoch:  # behind a recovery it takes a step to tell who waits
            self._tell_positions()
        for identity, answer, _ in owned:
            if answer.sequence.is_finished:
                self._finish(identity, answer)

    def _tell_positions(self) -> None:
        """Whoever waits hears its place in the queue where it has changed, or what it waits for has: so many at a time,
        from the front to the end and again, however long the queue is.
        """
        waits_for = self._chat_model.waits_for()
        queue = self._chat_model.engine.queue(self._next_told, _TURN_POSITIONS)
        self._next_told = self._next_told + len(queue) if len(queue) == _TURN_POSITIONS else 0
        for position, sequence in queue:
            told, answer = (position, waits_for is None), self._by_sequence.get(sequence.sequence_id)
            if answer is not None and self._told.get(sequence.sequence_id) != told:
                self._told[sequence.sequence_id] = told
                owner = self._owners[sequence.sequence_id]
                self._send(owner, client.Queued(answer.request_id, position, waits_for))

    def _finish(self, identity: bytes, answer: Answer) -> None:
        if self._forget((identity, answer.request_id)) is None:
            return  # its client was found gone a moment ago
        with answer.sequence.failing("the answer could not be decoded"):
            tail, finished = answer.close(self._chat_model.engine.pacing.reason())
        error = answer.sequence.error
        if error is not None:
            self._fail(identity, answer.request_id, error)
            return
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
            for key in [key for key in (*self._answers, *self._being_read) if key[0] == identity]:
                self._cancelled.discard(self._being_read.pop(key, 0))
                answer = self._forget(key)
                if answer is not None:
                    self._chat_model.engine.cancel(answer.sequence)
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
