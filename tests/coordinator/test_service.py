"""What the service does about a client that does not read; everything else is tested end to end."""

import itertools
import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from coordinator.service import Service
from protocol import client
from protocol.limits import MAX_PROMPT
from protocol.messages import Message
from protocol.wire import decode, encode

SLEEPER, READER = b"sleeper", b"reader"


class Router:
    """A ROUTER whose queue to the sleeper is full while `asleep`."""

    def __init__(self) -> None:
        self.asleep = False
        self.inbox: list[list[bytes]] = []
        self.sent: list[tuple[bytes, Message]] = []

    def poll(self, _timeout: int) -> bool:
        return bool(self.inbox)

    def recv_multipart(self) -> list[bytes]:
        return self.inbox.pop(0)

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        assert flags == zmq.NOBLOCK
        if self.asleep and frames[0] == SLEEPER:
            raise zmq.Again
        self.sent.append((frames[0], decode(frames[1:])[0]))


class Model:
    """A chat model that gives every answer one token a step, for ever. Of a text it has `read` the prompt."""

    def __init__(self, read: Callable[[str], object] = str) -> None:
        self.cancelled: list[Any] = []
        self.engine = SimpleNamespace(
            cancel=self.cancel, queue=lambda *_: [], pacing=SimpleNamespace(reason=lambda: None)
        )
        self.supervisor = SimpleNamespace(check=lambda: None)
        self.cluster = SimpleNamespace(epoch=1)
        self._read = read
        self._sequence_ids = itertools.count(1)

    def waits_for(self) -> str | None:
        return None

    def read(self, prompt: Any, _sampling: object) -> object:
        return self._read(prompt.text) if isinstance(prompt, client.TextPrompt) else None

    def enter(self, _read: object, request_id: int, **_: object) -> Any:
        sequence = SimpleNamespace(
            sequence_id=next(self._sequence_ids), is_finished=False, error=None, failing=lambda _: nullcontext()
        )
        finished = client.Finished(request_id, "cancelled", "", (), NO_STATS)
        return SimpleNamespace(request_id=request_id, sequence=sequence, close=lambda _: (None, finished))

    def cancel(self, sequence: Any) -> None:
        sequence.is_finished = True
        self.cancelled.append(sequence)

    def walk(self, answers: dict[int, Any]) -> list[tuple[Any, client.Delta]]:
        return [(answer, client.Delta(answer.request_id, "x", (1,))) for answer in answers.values()]


NO_STATS = client.GenerationStats(0, 0.0, 0, 0, 0, 0, 0, 0, 0.0, 0.0, (), ())


def run_until(service: Service, is_done: Callable[[], bool]) -> None:
    """At most ten thousand rounds."""
    rounds = itertools.count()
    service.run(lambda: is_done() or next(rounds) == 10_000)
    assert is_done()


def test_a_client_that_does_not_read_is_cancelled_and_told_when_it_does() -> None:
    """Its answer ends at the first delta that finds its queue full; another client's goes on; the debt is paid once."""
    router, model = Router(), Model()
    service = Service(model, router)  # type: ignore[arg-type]
    for identity in (SLEEPER, READER):
        generate = client.Generate(4, client.TokenPrompt((1,)), None)
        router.inbox.append([identity, *encode(generate)])  # type: ignore[list-item]

    def run(num_rounds: int) -> None:
        rounds = iter([False] * num_rounds + [True])
        service.run(lambda: next(rounds))

    run(2)
    router.asleep = True
    run(3)
    assert len(model.cancelled) == 1
    assert sum(identity == READER for identity, _ in router.sent) == 5
    router.asleep = False
    run(2)
    told = [message for identity, message in router.sent if identity == SLEEPER]
    assert [type(message).__name__ for message in told] == ["Delta", "Delta", "Error"]
    assert "did not read" in told[-1].text


def test_an_answer_too_large_for_a_message_ends_as_an_error() -> None:
    """The client hears that, and why; the launch goes on."""
    router = Router()
    service = Service(Model(), router)  # type: ignore[arg-type]
    service._send(READER, client.Delta(4, "x" * (MAX_PROMPT + 1), ()))
    [(_, told)] = router.sent
    assert isinstance(told, client.Error)
    assert told.request_id == 4 and "cannot be sent" in told.text


def test_a_flood_of_garbage_is_mentioned_seldom(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand malformed messages make ten lines."""
    router = Router()
    router.inbox = [[READER, b"garbage"] for _ in range(1000)]
    Service(Model(), router).run(lambda: not router.inbox)  # type: ignore[arg-type]
    assert len(caplog.records) == 10


@pytest.mark.parametrize("junk", [b"x", b"\xc6" * 2**20], ids=["many", "large"])
def test_a_flood_holds_up_nobodys_answer(junk: bytes) -> None:
    """Between two tokens of an answer only so many messages, and so many bytes, are taken in."""
    router = Router()
    generate = client.Generate(4, client.TokenPrompt((1,)), None)
    router.inbox = [[READER, *encode(generate)], *([SLEEPER, junk] for _ in range(300))]  # type: ignore[list-item]
    rounds = iter([False] * 4 + [True])
    Service(Model(), router).run(lambda: next(rounds))  # type: ignore[arg-type]
    assert [type(message).__name__ for _, message in router.sent] == ["Delta"] * 4
    assert len(router.inbox) >= 301 - 4 * 64


def test_so_many_requests_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused with the reason, and the others go on."""
    monkeypatch.setattr("coordinator.service._MOST_OPEN", 3)
    router = Router()
    requests = [client.Generate(number, client.TokenPrompt((1,)), None) for number in range(4)]
    router.inbox = [[READER, *encode(request)] for request in requests]  # type: ignore[list-item]
    rounds = iter([False, True])
    Service(Model(), router).run(lambda: next(rounds))  # type: ignore[arg-type]
    refused, *others = [message for _, message in router.sent]
    assert isinstance(refused, client.Error)
    assert refused.request_id == 3 and "3 requests are open" in refused.text
    assert [each.request_id for each in others] == [0, 1, 2]


def of(router: Router, identity: bytes, kind: type[Message]) -> list[Any]:
    return [message for who, message in router.sent if who == identity and isinstance(message, kind)]


def ask(router: Router, identity: bytes, request_id: int, text: str | None = None) -> None:
    prompt = client.TokenPrompt((1,)) if text is None else client.TextPrompt(text)
    router.inbox.append([identity, *encode(client.Generate(request_id, prompt, None))])  # type: ignore[list-item]


def test_a_prompt_that_takes_long_to_read_holds_up_nobodys_answer() -> None:
    """A tokenizer or template at work for as long as it likes: a neighbour has a token each step."""
    router, may_end = Router(), threading.Event()
    with Service(Model(lambda _: may_end.wait(60)), router) as service:  # type: ignore[arg-type]
        ask(router, READER, 1)
        ask(router, SLEEPER, 2, "long")
        run_until(service, lambda: len(of(router, READER, client.Delta)) == 50)
        assert not of(router, SLEEPER, client.Delta)
        may_end.set()
        run_until(service, lambda: bool(of(router, SLEEPER, client.Delta)))


class _PanicException(BaseException):
    """As what libraries written in Rust raise: no Exception."""


@pytest.mark.parametrize("fault", [_PanicException("gave up"), MemoryError("no room"), KeyError("odd")])
def test_a_prompt_that_cannot_be_read_fails_alone(fault: BaseException) -> None:
    """Of whatever class the fault is: one error, with its words, and the other answers go on."""

    def read(text: str) -> str:
        if text == "bad":
            raise fault
        return text

    router = Router()
    with Service(Model(read), router) as service:  # type: ignore[arg-type]
        for request_id, text in enumerate(["bad", "good", "bad"], start=1):
            ask(router, READER, request_id, text)
        run_until(service, lambda: len(of(router, READER, client.Error)) == 2)
        run_until(service, lambda: bool(of(router, READER, client.Delta)))
    told = of(router, READER, client.Error)
    assert [error.request_id for error in told] == [1, 3]
    assert all(error.text == f"the request could not be read: {fault}" for error in told)
    assert {delta.request_id for delta in of(router, READER, client.Delta)} == {2}


def test_clients_have_their_prompts_read_in_turns() -> None:
    """Whoever asks a hundred things has another one's only question read second."""
    router, order, may_begin = Router(), [], threading.Event()

    def read(text: str) -> str:
        may_begin.wait(60)
        order.append(text)
        return text

    with Service(Model(read), router) as service:  # type: ignore[arg-type]
        for request_id in range(100):
            ask(router, SLEEPER, request_id, "one of many")
        ask(router, READER, 1, "the only one")
        run_until(service, lambda: not router.inbox)
        may_begin.set()
        run_until(service, lambda: len(order) == 101)
    assert order.index("the only one") <= 2


def test_what_is_being_read_can_be_cancelled_and_forgotten() -> None:
    """A cancel ends it with Finished, a client that is gone has nothing begun; both can ask again."""
    router, may_end, model = Router(), threading.Event(), Model(lambda _: may_end.wait(60))
    with Service(model, router) as service:  # type: ignore[arg-type]
        ask(router, READER, 1, "cancelled")
        ask(router, SLEEPER, 1, "gone")
        router.inbox.append([READER, *encode(client.Cancel(1))])  # type: ignore[list-item]
        run_until(service, lambda: not router.inbox)
        router.asleep = True
        service._send(SLEEPER, client.Delta(9, "x", ()))
        router.asleep = False
        may_end.set()
        run_until(service, lambda: bool(of(router, READER, client.Finished)))
        assert not service._answers and not service._being_read
        ask(router, READER, 1, "again")
        ask(router, SLEEPER, 1, "again")
        run_until(service, lambda: bool(of(router, READER, client.Delta)) and bool(of(router, SLEEPER, client.Delta)))
