"""What clients hear while the stages are brought back: everything but tokens."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from coordinator.chat_model import ChatModel
from coordinator.errors import LaunchError, StageLost
from coordinator.mending import Mender
from coordinator.planning import plan_for
from coordinator.recovery import RecoveryPolicy
from coordinator.scheduler import SchedulerSettings
from coordinator.service import Service
from glm.config import load_config
from glm.sampling import SamplingParams
from protocol import client
from protocol.messages import Message
from protocol.wire import decode, encode
from tests.coordinator.hash_model import HashPipeline, expected_ids, hash_engine
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

STAYS, OTHER = b"stays", b"other"
PROMPT = (1, 2, 3)
GREEDY = SamplingParams(greedy=True)


class Router:
    """A ROUTER with what clients say in `inbox`; whoever is in `gone` cannot be reached."""

    def __init__(self) -> None:
        self.inbox: list[list[bytes]] = []
        self.sent: list[tuple[bytes, Message]] = []
        self.gone: set[bytes] = set()

    def hear(self, identity: bytes, message: Any) -> None:
        self.inbox.append([identity, *map(bytes, encode(message))])

    def poll(self, _timeout: int) -> bool:
        return bool(self.inbox)

    def recv_multipart(self) -> list[bytes]:
        return self.inbox.pop(0)

    def send_multipart(self, frames: list[bytes], flags: int) -> None:  # noqa: ARG002
        if frames[0] in self.gone:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self.sent.append((frames[0], decode(frames[1:])[0]))

    def told(self, identity: bytes, kind: type[Message]) -> list[Any]:
        return [message for who, message in self.sent if who == identity and isinstance(message, kind)]


class Cluster:
    """Loses its only stage after some outcomes; bringing it back takes as long as `outage` has something to say."""

    kv_budgets, num_stages, epoch = (1000,), 1, 1

    def __init__(self, pipeline: HashPipeline, plan: Any, lost_after: int) -> None:
        self.plan = plan
        self.meanwhile: Callable[[], None] = lambda: None
        self.outage: list[Callable[[], None]] = []
        self.ends_with: Exception | None = None
        self._pipeline = pipeline
        self._collect, self._left = pipeline.collect, lost_after
        pipeline.collect = self.collect  # type: ignore[method-assign]

    def collect(self, epoch: int, _limit_s: object = None) -> Any:
        self._left -= 1
        if self._left == -1:
            raise StageLost("stage 1 (cpu of lab3) has been silent for 2.8 s")
        return self._collect(epoch)

    def recover(self, _is_stuck: bool) -> int:
        self._pipeline.cached.clear()
        self._pipeline._in_flight.clear()
        num_steps = len(self._pipeline.steps)
        for act in self.outage:
            act()
            self.meanwhile()
        assert len(self._pipeline.steps) == num_steps, "something was sent into a pipeline that is lost"
        if self.ends_with is not None:
            raise self.ends_with
        self.epoch = 2
        return 2

    def check(self) -> None: ...

    def awaited(self) -> str | None:
        return None

    def next_try(self, _is_stuck: bool) -> str:
        return "waiting 60 s at most for it to come back"

    def waits_for(self) -> str:
        return "a worker for stage 1 (cpu of lab3)"


Launch = Callable[..., tuple[Service, Router, Cluster, ChatModel]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """A service over the hash model that loses its stage after three outcomes."""

    def launched(attempts: int = 1) -> tuple[Service, Router, Cluster, ChatModel]:
        write_checkpoint(tmp_path, CAUSAL)
        config = load_config(tmp_path)
        engine, pipeline = hash_engine(SchedulerSettings(1000, speculate=False))
        cluster = Cluster(pipeline, plan_for(None, config.num_layers, ["cpu"]), lost_after=3)
        mender = Mender(cluster, RecoveryPolicy(attempts), lambda _: None, sleep=lambda _: None)  # type: ignore[arg-type]
        chat_model = ChatModel(cluster, engine, config, tmp_path, None, mender)  # type: ignore[arg-type]
        router = Router()
        service = Service(chat_model, router)  # type: ignore[arg-type]
        cluster.meanwhile = service.listen
        return service, router, cluster, chat_model

    return launched


def generate(request_id: int, num_new: int) -> client.Generate:
    sampling = client.SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), num_new, True, True)
    return client.Generate(request_id, client.TokenPrompt(PROMPT), sampling)


def run(service: Service, chat_model: ChatModel, router: Router) -> None:
    """Until everything is answered."""
    rounds = iter(range(200))

    def is_done() -> bool:
        assert next(rounds, None) is not None, "it does not end"
        return chat_model.engine.is_idle and not router.inbox and bool(router.sent)

    service.run(is_done)


def expected(num_new: int) -> tuple[int, ...]:
    return tuple(expected_ids(PROMPT, num_new, GREEDY, is_repetitive=False))


def test_a_cancel_during_an_outage_ends_the_answer_at_once(launch: Launch) -> None:
    """Its client has Finished before the stages are back, nothing is sent to them, and the other answer goes on."""
    service, router, cluster, chat_model = launch()
    router.hear(STAYS, generate(1, 8))
    router.hear(OTHER, generate(2, 8))
    seen: list[Any] = []
    cluster.outage = [
        lambda: router.hear(OTHER, client.Cancel(2)),
        lambda: seen.extend(router.told(OTHER, client.Finished)),
    ]
    run(service, chat_model, router)
    (cancelled,) = seen
    assert cancelled.finish_reason == "cancelled" and cancelled.request_id == 2
    assert len(router.told(OTHER, client.Finished)) == 1 and not router.told(OTHER, client.Error)
    (finished,) = router.told(STAYS, client.Finished)
    assert finished.token_ids == expected(8)


def test_requests_during_an_outage_are_queued_and_answered_after_it(launch: Launch) -> None:
    """Each hears its place and what the launch waits for; whoever asks what runs there hears that as well."""
    service, router, cluster, chat_model = launch()
    router.hear(STAYS, generate(1, 8))
    cluster.outage = [
        lambda: router.hear(OTHER, generate(2, 5)),
        lambda: router.hear(OTHER, client.Describe(3)),
    ]
    run(service, chat_model, router)
    (queued,) = router.told(OTHER, client.Queued)
    (description,) = router.told(OTHER, client.Description)
    assert queued.position == 1
    for waits_for in (queued.waits_for, description.waits_for):
        assert waits_for.startswith("a worker for stage 1 (cpu of lab3), for ") and waits_for.endswith(" s already")
    assert chat_model.describe().waits_for is None
    assert [m.token_ids for m in router.told(OTHER, client.Finished)] == [expected(5)]
    assert [m.token_ids for m in router.told(STAYS, client.Finished)] == [expected(8)]


def test_a_client_that_vanishes_during_an_outage_is_forgotten(launch: Launch) -> None:
    """Nobody computes for it afterwards, and nothing is said to the lost stages because of it."""
    service, router, cluster, chat_model = launch()
    router.hear(STAYS, generate(1, 8))

    def vanish() -> None:
        router.hear(OTHER, generate(2, 5))
        router.gone.add(OTHER)

    cluster.outage = [vanish, lambda: None]
    run(service, chat_model, router)
    assert [m.token_ids for m in router.told(STAYS, client.Finished)] == [expected(8)]
    assert chat_model.engine.load().num_waiting == 0 and not router.told(OTHER, client.Finished)


def test_a_cancelled_answer_does_not_fail_with_the_others(launch: Launch) -> None:
    """The stages do not come back: whoever cancelled in time has a Finished and no error, the others have the error."""
    service, router, cluster, chat_model = launch()
    router.hear(STAYS, generate(1, 8))
    router.hear(OTHER, generate(2, 8))
    cluster.outage = [lambda: router.hear(OTHER, client.Cancel(2))]
    cluster.ends_with = LaunchError("it cannot hold its layers")
    run(service, chat_model, router)
    assert [m.finish_reason for m in router.told(OTHER, client.Finished)] == ["cancelled"]
    assert not router.told(OTHER, client.Error)
    (error,) = router.told(STAYS, client.Error)
    assert "could not be brought back" in error.text
    waits_for = chat_model.describe().waits_for
    assert waits_for is not None and "it cannot hold its layers" in waits_for


def test_the_pause_before_another_attempt_answers_clients_too() -> None:
    """Attempts are up to 10 s apart, which is as long as a client waits for a first word."""
    asked: list[int] = []
    cluster: Any = SimpleNamespace(meanwhile=lambda: asked.append(1))
    Mender(cluster, RecoveryPolicy())._pause(0.25)
    assert len(asked) >= 2
