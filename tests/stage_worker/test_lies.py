"""A coordinator, or the stage before, says something false in one field at a time: a worker answers, and goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from protocol.control import Failed, Inspect, Inspected, Ready, Release, Released
from protocol.data import DropSequence, ForkSequence, Span, Step, StepFailed, TruncateSequence
from protocol.errors import ProtocolError
from protocol.limits import MAX_STEP_BYTES
from protocol.records import AnyRecord, with_changes
from protocol.sockets import send
from protocol.tensors import RawTensor
from protocol.torch_bridge import to_raw
from protocol.wire import encode
from tests.end_to_end.lies import lies, told
from tests.stage_worker.fake_coordinator import FakeCoordinator, FakeWorker, fake_coordinator
from tests.tiny_checkpoints import CAUSAL, PREFIX, write_checkpoint

pytestmark = pytest.mark.slow

MOST_MEMORY_BYTES = 4 * MAX_STEP_BYTES
Pair = tuple[FakeCoordinator, FakeWorker]


@pytest.fixture(params=[CAUSAL, PREFIX], ids=["causal", "prefix"])
def model_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", request.param)
    return tmp_path / "model"


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """A worker that asks no hub for a model's false name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with fake_coordinator() as coordinator:
        worker = coordinator.spawn("--worker-id", "one")
        coordinator.admit(worker)
        yield coordinator, worker


def false(message: AnyRecord, tensors: tuple[RawTensor, ...] = ()) -> Iterator[AnyRecord]:
    """The message with one false field, for each that can be sent at all."""
    for lie in lies(type(message)):
        try:
            lied = told(message, lie.path, lie.value)
            encode(lied, tensors)
        except (ProtocolError, KeyError, TypeError):
            continue
        yield lied


def resident_bytes(worker: FakeWorker) -> int:
    return 4096 * int(Path(f"/proc/{worker.process.pid}/statm").read_text().split()[1])


def test_a_false_assignment_is_taken_or_answered(joined: Pair, model_dir: Path) -> None:
    """Ready or Failed, for every field; the true one afterwards is taken by the same process."""
    coordinator, worker = joined
    assignment = worker.assignment(model_dir, 0, 2)
    for message in false(assignment):
        reply = worker.request(message)
        assert isinstance(reply, Ready | Failed) and reply.epoch == message.epoch, message
    for message in (*false(Inspect(5, 1, 0, "key", 0)), *false(Release(5, 1))):
        assert isinstance(worker.request(message), Inspected | Failed | Released)
    assert isinstance(worker.assign(model_dir, 0, 2), Ready)
    assert coordinator.workers[0].process.poll() is None


def test_a_false_step_fails_alone(joined: Pair, model_dir: Path) -> None:
    """Whatever it says of sequences, positions, layouts and times: the next step of its sequence is done."""
    coordinator, worker = joined
    assert isinstance(worker.assign(model_dir, 0, 2, record_hidden_states=True), Ready)
    hidden = torch.randn(5, 32)
    is_prefix = isinstance(_outcome(coordinator, worker, hidden, 1, None), str)
    layout = (4, 3) if is_prefix else (None, None)
    before, step_id = resident_bytes(worker), 100
    updates = (ForkSequence(1, 2, 2), TruncateSequence(2, 1), DropSequence(2))
    steps = false(Step(1, 100, updates, (Span(1, 0, 5, *layout),), ()), (to_raw(hidden),))
    failures = false(StepFailed(1, 100, 0, "internal", "no", updates, ()))
    for lie in (*steps, *failures):
        if lie.step_id > 10**6:
            continue  # what comes with a lower number afterwards was there before
        step_id += 10
        tensors = (to_raw(hidden),) if isinstance(lie, Step) else ()
        send(coordinator.push_to(worker), with_changes(lie, step_id=min(lie.step_id, step_id)), tensors)
        truth = Step(1, step_id + 5, (DropSequence(7),), (Span(3, 0, 5, *layout),), ())
        send(coordinator.push_to(worker), truth, (to_raw(hidden),))
        while (outcome := coordinator.collect()[0]).step_id != step_id + 5:
            pass
        assert isinstance(outcome, Step), (lie, outcome)
    for what in ("hidden", "key", "value"):
        assert isinstance(worker.request(Inspect(9, 3, 0, what, 2**31 - 1)), Inspected)
    assert resident_bytes(worker) - before < MOST_MEMORY_BYTES


def _outcome(
    coordinator: FakeCoordinator, worker: FakeWorker, hidden: torch.Tensor, step_id: int, context_length: int | None
) -> Step | str:
    """The step as it comes back, or why it failed."""
    coordinator.send_step(worker, hidden, Span(1, 0, 5, context_length, None), step_id=step_id)
    outcome, _ = coordinator.collect()
    return outcome if isinstance(outcome, Step) else outcome.text
