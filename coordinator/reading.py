"""Prompts become token ids on a thread of their own: no answer stands still while a tokenizer or a template works."""

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from coordinator.closing import Closing
from coordinator.errors import CoordinatorError, GenerationError
from glm.errors import GlmError, faults_as
from protocol.client import Generate

LEAVING_S = 2.0
"""How long a text that is being read when the launch ends may hold that up."""
Ready = TypeVar("Ready")


@dataclass(frozen=True, slots=True)
class Read(Generic[Ready]):
    """What became of a request: what it is now, or why it cannot be answered. `ticket` is that of `Reading.add`."""

    ticket: int
    identity: bytes
    message: Generate
    outcome: Ready | CoordinatorError | GlmError


class Reading(Closing, Generic[Ready]):
    """Requests to be read, clients in turns, and those that have been; used from one thread.

    Its own thread begins with the first request.
    """

    def __init__(self, read: Callable[[Generate], Ready]) -> None:
        """`read` is called in the other thread; whatever it raises is that request's outcome."""
        self._read = read
        self._asked: OrderedDict[bytes, deque[tuple[int, Generate]]] = OrderedDict()
        self._changed = threading.Condition()
        self._done: queue.SimpleQueue[Read[Ready]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._num_asked = 0

    def add(self, identity: bytes, message: Generate) -> int:
        """Have a request read; returns its ticket."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reading", daemon=True)
            self._thread.start()
        with self._changed:
            self._num_asked += 1
            self._asked.setdefault(identity, deque()).append((self._num_asked, message))
            self._changed.notify()
            return self._num_asked

    def take(self, wait_s: float = 0.0) -> Read[Ready] | None:
        """The next one that has been read; None where there is none within `wait_s` seconds."""
        try:
            return self._done.get(wait_s > 0, wait_s or None)
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the thread; what was not read is dropped."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(LEAVING_S)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._asked)
                if self._is_over:
                    return
                identity, ticket, message = self._next()
            self._done.put(Read(ticket, identity, message, self._outcome(message)))

    def _next(self) -> tuple[bytes, int, Generate]:
        """Of the client whose turn it is, the oldest."""
        identity, asked = self._asked.popitem(last=False)
        ticket, message = asked.popleft()
        if asked:
            self._asked[identity] = asked
        return identity, ticket, message

    def _outcome(self, message: Generate) -> Ready | CoordinatorError | GlmError:
        try:
            with faults_as(GenerationError, "the request could not be read"):
                return self._read(message)
        except (CoordinatorError, GlmError) as error:
            return error
