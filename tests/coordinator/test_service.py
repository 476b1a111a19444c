"""What the service does about a client that does not read; everything else is tested end to end."""

from types import SimpleNamespace
from typing import Any

import zmq

from coordinator.service import Service
from protocol import client
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
        self.engine = SimpleNamespace(cancel=self.cancelled.append)
        self.cluster = SimpleNamespace(check=lambda: None)

    def begin(self, _prompt: object, _sampling: object, request_id: int) -> Any:
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
