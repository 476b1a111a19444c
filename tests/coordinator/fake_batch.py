"""A scripted backend for many requests at once."""

import random
from collections.abc import Callable

from coordinator.batch import Ended, Progress, Request
from coordinator.errors import GenerationError
from glm.logprobs import TokenLogprob
from protocol.client import ChatPrompt, Description, Finished
from protocol.records import with_changes
from tests.coordinator.fake_backend import DEFAULTS, STATS


class FakeBatch:
    """Answers a question with itself and the seed, a random one of those open at each poll.

    The question `refused` is refused, `broken` fails on its way, `cancelled` ends so. `on_poll` is called before each.
    """

    def __init__(self, on_poll: Callable[[], None] = lambda: None, precision: str = "fp32") -> None:
        self.precision = precision
        self.open: dict[int, tuple[str, Request, int | None]] = {}
        self.most_open = 0
        self.requests: list[Request] = []
        self.was_dropped = False
        self.on_poll = on_poll
        self._next_ticket = 1
        self._choice = random.Random(5)

    def describe(self) -> Description:
        return Description(0, "fake-model", "chatglm2", 100, (), DEFAULTS, None, "f1", self.precision, "chatglm2")

    def submit(self, request: Request) -> list[int]:
        assert isinstance(request.prompt, ChatPrompt)
        question = request.prompt.turns[-1].content
        if question == "refused":
            raise GenerationError("it does not fit")
        self.requests.append(request)
        tickets = list(range(self._next_ticket, self._next_ticket + request.num_answers))
        self._next_ticket += request.num_answers
        for index, ticket in enumerate(tickets):
            seed = request.sampling.seed
            self.open[ticket] = (question, request, None if seed is None else seed + index)
        self.most_open = max(self.most_open, len(self.open))
        return tickets

    def poll(self) -> Progress:
        self.on_poll()
        ticket = self._choice.choice(list(self.open))
        question, request, seed = self.open.pop(ticket)
        if question == "broken":
            return Progress(1, (Ended(ticket, None, "stage 2 could not do the step"),))
        reason = "cancelled" if question == "cancelled" else "stop"
        finished = Finished(ticket, reason, f"{question} {seed}", (7,), with_changes(STATS, new_tokens=1))
        logprobs = None if request.num_logprobs is None else (TokenLogprob(7, -0.5),)
        return Progress(1, (Ended(ticket, finished, None, logprobs),))

    def drop(self) -> None:
        self.was_dropped = True
        self.open.clear()
