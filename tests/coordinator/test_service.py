"""What the service does about a client that does not read; everything else is tested end to end."""

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
    """A chat model that gives every answer one token a step, for ever."""

    def __init__(self) -> None:
        self.cancelled: list[Any] = []
        self.engine = SimpleNamespace(cancel=self.cancelled.append, queue_position=lambda _: 0)
        self.supervisor = SimpleNamespace(check=lambda: None)
        self.cluster = SimpleNamespace(epoch=1)

    def waits_for(self) -> str | None:
        return None

    def begin(self, _prompt: object, _sampling: object, request_id: int, **_: object) -> Any:
        return SimpleNamespace(request_id=request_id, sequence=SimpleNamespace(is_finished=False, error=None))

    def step(self, answers: list[Any]) -> list[tuple[Any, client.Delta]]:
        return [(answer, client.Delta(answer.request_id, "x", (1,))) for answer in answers]


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
