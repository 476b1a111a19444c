"""The coordinator's two ends of the chain, with the test in the stages' place."""

import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq

from coordinator.errors import StageLost, StepStuck
from coordinator.first_step import send_first_step
from coordinator.pipeline import Pipeline
from coordinator.timing import EndsClock, step_timing
from protocol.data import Span, StageTiming, Step, StepFailed
from protocol.sockets import Socket, bind, connect, data_socket, receive, send
from protocol.torch_bridge import from_raw, to_raw
from protocol.wire import decode, encode


class Chain:
    """A pipeline whose only stage is the test."""

    def __init__(self, context: "zmq.Context[Socket]", directory: Path) -> None:
        self.checks = 0
        self.pipeline = Pipeline(context, f"ipc://{directory}/return", self.check, hosts=(None,))
        self.pull, self.push = data_socket(context, zmq.PULL), data_socket(context, zmq.PUSH)
        self.pipeline.connect(bind(self.pull, f"ipc://{directory}/stage"))
        connect(self.push, self.pipeline.return_endpoint)
        self.broken: StageLost | None = None

    def check(self) -> None:
        self.checks += 1
        if self.broken is not None:
            raise self.broken


@pytest.fixture
def chain(context: "zmq.Context[Socket]", tmp_path: Path) -> Iterator[Chain]:
    chain = Chain(context, tmp_path)
    yield chain
    chain.pipeline.close()


def a_step(step_id: int, epoch: int = 1, timings: tuple[StageTiming, ...] = ()) -> Step:
    return Step(epoch, step_id, (), (Span(1, 0, 2, None, None),), timings)


def done(step: Step) -> Step:
    """As it comes back from the only stage."""
    return step.with_timing(StageTiming(0, 1.0, 0.0, 1.0, 2))


def test_outcomes_come_back_in_order_with_their_tensors(chain: Chain) -> None:
    """Two steps in flight; the hidden states arrive unchanged and each outcome knows when its step left."""
    hidden = torch.randn(2, 3)
    for step_id in (1, 2):
        chain.pipeline.submit(a_step(step_id), hidden + step_id)
    for step_id in (1, 2):
        message, tensors = decode(receive(chain.pull))
        assert isinstance(message, Step) and torch.equal(from_raw(tensors[0]), hidden + step_id)
        send(chain.push, done(message), tensors)
    outcomes = [chain.pipeline.collect(epoch=1) for _ in range(2)]
    assert [outcome.message.step_id for outcome in outcomes] == [1, 2]
    assert torch.equal(outcomes[1].hidden, hidden + 2)
    assert all(o.submitted_at_s <= o.arrived_at_s <= time.monotonic() for o in outcomes)


def test_garbage_strangers_and_old_epochs_are_dropped(chain: Chain) -> None:
    """What was never submitted, is malformed, or belongs to an older epoch does not become an outcome."""
    chain.pipeline.submit(a_step(5, epoch=2), torch.zeros(2, 3))
    tensor = to_raw(torch.ones(2, 3))
    chain.push.send_multipart([b"\x00" * 30])
    send(chain.push, a_step(9, epoch=2), (tensor,))
    send(chain.push, a_step(4, epoch=1), (tensor,))
    send(chain.push, StepFailed(2, 5, 0, "kv_budget", "full", (), done(a_step(5)).timings))
    outcome = chain.pipeline.collect(epoch=2)
    assert isinstance(outcome.message, StepFailed)
    assert outcome.hidden is None


def test_what_no_stage_would_answer_spoils_no_step(chain: Chain) -> None:
    """An old epoch, other spans, another width under the id of a step on its way: the true answer still counts."""
    hidden = torch.randn(2, 3)
    chain.pipeline.submit(a_step(5, epoch=2), hidden)
    send(chain.push, a_step(5, epoch=1), (to_raw(hidden + 1),))
    send(chain.push, StepFailed(1, 5, 0, "internal", "long ago", (), done(a_step(5)).timings))
    send(chain.push, StepFailed(2, 5, 1_000_000, "internal", "where?", (), done(a_step(5)).timings))
    send(chain.push, done(Step(2, 5, (), (Span(8, 0, 2, None, None),), ())), (to_raw(hidden + 1),))
    send(chain.push, done(a_step(5, epoch=2)), (to_raw(torch.zeros(2, 4)),))
    send(chain.push, a_step(5, epoch=2), (to_raw(hidden + 1),))
    far = StageTiming(1_000_000, 1.0, 0.0, 1.0, 2)
    send(chain.push, a_step(5, epoch=2, timings=(far,)), (to_raw(hidden + 1),))
    send(chain.push, done(a_step(5, epoch=2)), (to_raw(hidden),))
    assert torch.equal(chain.pipeline.collect(epoch=2).hidden, hidden)
    assert chain.pipeline.objection == "its timings are not those of the 1 stages"


def test_waiting_ends_when_a_stage_is_gone(chain: Chain) -> None:
    """`collect` watches the stages' health while nothing comes."""
    chain.broken = StageLost("stage 1 is gone")
    with pytest.raises(StageLost, match="gone"):
        chain.pipeline.collect(epoch=1)
    assert chain.checks == 1


def test_waiting_ends_when_patience_does(chain: Chain) -> None:
    """All stages are well, but nothing comes back: after that time the step counts as stuck."""
    with pytest.raises(StepStuck, match="no stage answered for"):
        chain.pipeline.collect(epoch=1, limit_s=lambda: 0.15)
    assert chain.checks == 2


def test_a_first_stage_that_cannot_be_reached_takes_no_step_for_ever(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens there: sending is given up as waiting for an answer is, the stages' health being watched."""
    chain.pipeline.connect(f"ipc://{tmp_path}/nobody")
    with pytest.raises(StepStuck, match="the first stage took no step for"):
        chain.pipeline.submit(a_step(1), torch.zeros(2, 3), lambda: 0.15)
    assert chain.checks == 2 and chain.pipeline.took_nothing
    monkeypatch.setattr("coordinator.first_step.FIRST_STEP_S", 0.15)
    with pytest.raises(StepStuck, match=r"did not come back within .*between this host and stage 1"):
        send_first_step(chain.pipeline, 1, 3, lambda: "between this host and stage 1")


def test_the_first_step_of_an_epoch_comes_back(chain: Chain) -> None:
    """It has no sequence and no token, and counts as one that was sent and has come back."""

    def check() -> None:
        message, tensors = decode(receive(chain.pull))
        assert isinstance(message, Step)
        send(chain.push, done(message), tensors)

    chain.pipeline._check = check
    send_first_step(chain.pipeline, 1, 3, lambda: "nowhere")
    assert (chain.pipeline.num_sent, chain.pipeline.num_back, chain.pipeline.bytes_under_way) == (1, 1, 0)


def test_a_process_that_stands_still_is_no_slow_step(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes between two looks beyond the time of a poll is neither waited nor what a step took."""
    chain.pipeline.submit(a_step(1), torch.zeros(2, 3))
    now_s = time.monotonic

    def stand_still() -> None:
        monkeypatch.setattr("coordinator.pipeline.time.monotonic", lambda: now_s() + 3600.0)
        message, tensors = decode(receive(chain.pull))
        assert isinstance(message, Step)
        send(chain.push, done(message), tensors)
        chain.pipeline._check = lambda: None

    chain.pipeline._check = stand_still
    outcome = chain.pipeline.collect(epoch=1, limit_s=lambda: 600.0)
    assert outcome.arrived_at_s - outcome.submitted_at_s > outcome.took_s + 3599.0


def test_a_flood_of_garbage_prolongs_no_waiting(chain: Chain) -> None:
    """What is no answer counts as no news: patience ends, and the stages are watched, while something always comes."""
    frames = [[b"\x00" * 30], encode(a_step(4), (to_raw(torch.zeros(2, 3)),))]
    flood = itertools.cycle(frames)

    def check() -> None:
        chain.checks += 1
        assert chain.checks < 100_000, "waits without end"
        chain.push.send_multipart(next(flood))

    chain.pipeline._check = check
    chain.push.send_multipart(next(flood))
    with pytest.raises(StepStuck, match="no stage answered for"):
        chain.pipeline.collect(epoch=1, limit_s=lambda: 0.15)
    assert chain.checks >= 2
    chain.broken = StageLost("stage 1 is gone")
    chain.pipeline._check = chain.check
    with pytest.raises(StageLost):
        chain.pipeline.collect(epoch=1, limit_s=lambda: 60.0)


def test_wire_time_is_what_the_stages_did_not_spend(chain: Chain) -> None:
    """A hop counts for the stage it leads to, the way back for the last stage."""
    chain.pipeline.hosts = (None, None)
    chain.pipeline.submit(a_step(1), torch.zeros(2, 3))
    submitted = chain.pipeline._submitted[1]
    left_at_s = submitted.at_s - 3.0
    chain.pipeline._submitted[1] = replace(submitted, at_s=left_at_s)
    timings = (
        StageTiming(0, left_at_s + 0.25, 0.5, left_at_s + 1.0, 7),
        StageTiming(1, left_at_s + 1.125, 0.5, left_at_s + 2.0, 9),
    )
    send(chain.push, Step(1, 1, (), a_step(1).spans, timings), (to_raw(torch.zeros(2, 3)),))
    outcome = chain.pipeline.collect(epoch=1)
    timing = step_timing(outcome, EndsClock())
    first, last = timing.stages
    assert (first.compute_s, first.kv_tokens) == (0.5, 7)
    assert first.wire_s == pytest.approx(0.25)
    assert last.wire_s == pytest.approx(0.125 + max(0.0, outcome.arrived_at_s - timings[1].sent_at_s))
    assert timing.ends.wire_s == pytest.approx(last.wire_s - 0.125)
    assert timing.ends.compute_s == 0


class _InterruptedBetweenFrames:
    """A socket behind whose first frame Ctrl-C arrives."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket

    def send(self, frame: bytes, flags: int, **options: object) -> None:
        self._socket.send(frame, flags, **options)
        if flags & zmq.SNDMORE:
            signal.raise_signal(signal.SIGINT)

    def __getattr__(self, name: str) -> object:
        return getattr(self._socket, name)


def test_an_interruption_between_two_frames_leaves_a_whole_step(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame would begin the next step, which no stage would understand: what it says is done is lost."""
    hidden = torch.randn(2, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chain.pipeline, "_push", _InterruptedBetweenFrames(chain.pipeline._push))
        chain.pipeline.submit(a_step(1), hidden)
    chain.pipeline.submit(a_step(2), hidden)
    assert [decode(receive(chain.pull))[0].step_id for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
