"""Many requests that wait: each hears its place, and a step costs what those cost that take part in it."""

import sys
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

from coordinator.chat_model import ChatModel
from coordinator.planning import plan_for
from coordinator.scheduler import SchedulerSettings
from coordinator.service import _TURN_POSITIONS, Service
from glm.config import load_config
from protocol import client
from tests.coordinator.hash_model import hash_engine
from tests.coordinator.test_outage import Router
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

CLIENT = b"client"


def service_of(directory: Path, num_requests: int, num_new: int, max_num_seqs: int = 4) -> tuple[Service, Router]:
    """A service over the hash model with so many requests, of which a few run."""
    sampling = client.SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), num_new, True, True)
    write_checkpoint(directory, CAUSAL)
    config = load_config(directory)
    engine, _ = hash_engine(SchedulerSettings(10_000, max_num_seqs=max_num_seqs, steps_in_flight=1, speculate=False))
    cluster = SimpleNamespace(
        plan=plan_for(None, config.num_layers, ["cpu"]), kv_budgets=(10_000,), num_stages=1, epoch=1, check=lambda: None
    )
    chat_model: Any = ChatModel(cluster, engine, config, directory)  # type: ignore[arg-type]
    router = Router()
    service = Service(chat_model, router)  # type: ignore[arg-type]
    for number in range(num_requests):
        prompt = client.TokenPrompt((1 + number % 5, 2, 3 + number % 7))
        router.hear(CLIENT, client.Generate(number, prompt, sampling))
    service.run(lambda: not router.inbox)
    return service, router


def calls_of(service: Service, num_steps: int) -> int:
    """How many functions of the coordinator so many steps call."""
    num_calls = 0

    def count(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal num_calls
        num_calls += event == "call" and Path(frame.f_code.co_filename).parent.name == "coordinator"

    sys.setprofile(count)
    try:
        for _ in range(num_steps):
            service._step()
    finally:
        sys.setprofile(None)
    return num_calls


def test_a_step_does_not_cost_more_where_more_wait(tmp_path: Path) -> None:
    """Counted in calls of functions, once all have heard their places: as many with 3000 that wait as with 150."""
    few, many = (service_of(tmp_path, num_requests, num_new=1000)[0] for num_requests in (150, 3000))
    for service in (few, many):
        calls_of(service, 3000 // _TURN_POSITIONS + 2)
    assert calls_of(many, 20) <= 1.1 * calls_of(few, 20)


def test_hearing_their_places_costs_a_step_no_more_where_more_wait(tmp_path: Path) -> None:
    """While answers end one after the other, and everybody moves up each time: so many hear of it in each step."""
    for num_requests in (200, 1000):
        service, router = service_of(tmp_path, num_requests, num_new=2)
        for _ in range(30):
            router.sent.clear()
            service._step()
            assert len(router.told(CLIENT, client.Queued)) <= _TURN_POSITIONS


def test_everybody_hears_a_place_however_long_the_queue_is(tmp_path: Path) -> None:
    """Some in each step, all of them in turns; who has heard a place hears of it again only once it has changed."""
    service, router = service_of(tmp_path, 300, num_new=50)
    router.sent.clear()
    service._told.clear()
    service._next_told = 0
    for _ in range(-(-296 // _TURN_POSITIONS)):
        service._step()
    queued = router.told(CLIENT, client.Queued)
    assert [(each.request_id, each.position) for each in queued] == [(4 + at, 1 + at) for at in range(296)]
    service._step()
    assert router.told(CLIENT, client.Queued) == queued


def test_all_of_a_long_queue_are_answered(tmp_path: Path) -> None:
    """In order of arrival, with their tokens, and nothing is remembered of them in the end."""
    service, router = service_of(tmp_path, 300, num_new=50)
    service.run(lambda: not service._answers)
    finished = router.told(CLIENT, client.Finished)
    assert [each.request_id for each in finished] == list(range(300))
    assert all(len(each.token_ids) == 50 for each in finished)
    assert not (service._by_sequence or service._owners or service._told)
