"""The control plane against scripted workers: who may join, deadlines, silence, garbage."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from coordinator import control, roster
from coordinator.control import ControlPlane
from coordinator.errors import LaunchError, StageLost
from coordinator.reply import Reply, expect, inspected_whole
from protocol.control import (
    Assign,
    Failed,
    Inspected,
    Join,
    Leaving,
    Ping,
    Pong,
    Progress,
    Ready,
    Refused,
    Release,
    Released,
    Shutdown,
    Welcome,
)
from protocol.errors import ProtocolError
from protocol.messages import Message
from protocol.sockets import Socket, connect, control_socket
from protocol.tensors import RawTensor
from protocol.version import VERSION
from protocol.wire import decode, encode

DEADLINE_S = 60.0
"""For whatever must happen sooner or later."""


class ScriptedWorker:
    """A DEALER that says what the test tells it to."""

    def __init__(self, context: "zmq.Context[Socket]", endpoint: str) -> None:
        self.dealer = control_socket(context, zmq.DEALER)
        connect(self.dealer, endpoint)

    def say(self, message: Message) -> None:
        self.dealer.send_multipart(encode(message))

    def join(self, worker_id: str, version: str = VERSION) -> Message:
        self.say(
            Join(
                7,
                worker_id,
                version,
                "2.13",
                "here",
                1,
                "cpu",
                "a CPU",
                1,
                1,
                1,
                (),
                "ipc:///nowhere",
                "key",
                False,
                None,
                None,
            )
        )
        return self.hear(Welcome, Refused)

    def hear(self, *wanted: type[Message]) -> Message:
        """The next message of one of these types."""
        give_up_at = time.monotonic() + DEADLINE_S
        while time.monotonic() < give_up_at:
            if self.dealer.poll(200):
                message, _ = decode(self.dealer.recv_multipart())
                if isinstance(message, wanted):
                    return message
        raise AssertionError(f"none of {wanted} came")


@pytest.fixture
def plane(context: "zmq.Context[Socket]", tmp_path: Path) -> Iterator[ControlPlane]:
    heard: list[tuple[str, Progress]] = []
    with ControlPlane(
        context, f"ipc://{tmp_path}/c", ["stage-1"], on_progress=lambda who, what: heard.append((who, what))
    ) as plane:
        plane.heard = heard  # type: ignore[attr-defined]
        yield plane


NewWorker = Callable[[], ScriptedWorker]


@pytest.fixture
def new_worker(context: "zmq.Context[Socket]", plane: ControlPlane) -> Iterator[NewWorker]:
    workers: list[ScriptedWorker] = []

    def make() -> ScriptedWorker:
        workers.append(ScriptedWorker(context, plane.endpoint))
        return workers[-1]

    yield make
    for worker in workers:
        worker.dealer.close(linger=0)


@pytest.fixture
def worker(new_worker: NewWorker) -> ScriptedWorker:
    return new_worker()


def test_an_expected_worker_is_welcomed_once(plane, worker, new_worker) -> None:  # type: ignore[no-untyped-def]
    """The second worker with the same id, an unknown id and another version are refused with the reason."""
    assert isinstance(worker.join("stage-1"), Welcome)
    assert set(plane.roster.wait_for_joins(DEADLINE_S, lambda: None)) == {"stage-1"}
    other = new_worker()
    for refused in (other.join("stage-1"), other.join("stage-9")):
        assert isinstance(refused, Refused)
        assert refused.code == "unknown_worker"


def test_another_version_is_refused_by_name(worker: ScriptedWorker) -> None:
    """Both versions and the remedy are in the refusal."""
    refused = worker.join("stage-1", version="0.0.1")
    assert isinstance(refused, Refused)
    assert "0.0.1" in refused.text and VERSION in refused.text and "same version" in refused.text


def test_a_request_gets_its_reply_or_meets_its_deadline(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """Replies find their requests by id, in any order; an unanswered one raises after its deadline."""
    worker.join("stage-1")
    first, second = (plane.begin("stage-1", Release(0, epoch)) for epoch in (1, 2))
    requests = [worker.hear(Release), worker.hear(Release)]
    for request in reversed(requests):
        worker.say(Released(request.request_id, request.epoch, 0))
    assert first.result(5)[0].epoch == 1
    assert second.result(5)[0].epoch == 2
    with pytest.raises(StageLost, match=r"stage-1 did not answer Release within 0\.2 s"):
        plane.request("stage-1", Release(0, 3), 0.2)


def test_no_worker_answers_for_another(plane, worker, new_worker) -> None:  # type: ignore[no-untyped-def]
    """A reply with the id of another worker's request is nobody's; the one that was asked still answers."""
    plane.roster.own |= {"stage-2"}
    liar = new_worker()
    worker.join("stage-1")
    liar.join("stage-2")
    future = plane.begin("stage-1", Release(0, 1))
    request = worker.hear(Release)
    own = plane.begin("stage-2", Release(0, 1))
    liar.say(Released(request.request_id, 66, 0))
    liar.say(Released(liar.hear(Release).request_id, 1, 0))
    assert own.result(5)[0].epoch == 1  # so that the lie was read before
    assert not future.done()
    worker.say(Released(request.request_id, 1, 0))
    assert future.result(DEADLINE_S)[0].epoch == 1


def test_failures_carry_the_workers_words(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """A Failed reply, or one of the wrong kind, becomes a LaunchError that names the stage."""
    worker.join("stage-1")
    future = plane.begin("stage-1", Release(0, 1))
    worker.say(Failed(worker.hear(Release).request_id, 1, "bad_model", "tensor x is missing"))
    with pytest.raises(LaunchError, match="stage 1: tensor x is missing"):
        expect(future.result(DEADLINE_S), Ready, "stage 1")
    with pytest.raises(LaunchError, match="answered Released where Ready was due"):
        expect((Released(1, 1, 0), ()), Ready, "stage 1")


def test_whoever_ends_says_goodbye(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """A launch that ends as it should is not taken for one that was lost."""
    worker.join("stage-1")
    plane.close()
    assert worker.hear(Leaving) == Leaving(0, "the launch has ended")


def test_pings_are_sent_and_pongs_kept(plane, worker, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Heartbeats go out by themselves; the latest answer is the worker's health report; progress is relayed."""
    monkeypatch.setattr(roster, "SILENCE_LIMIT_S", DEADLINE_S)
    worker.join("stage-1")
    ping = worker.hear(Ping)
    worker.say(Pong(ping.request_id, "serving", 1, 2.0, 3, 4, 1, 5, 6, 0, 0))
    worker.say(Progress(0, 1, 2, 3, 4))
    give_up_at = time.monotonic() + DEADLINE_S
    while not (plane.roster.pongs() and plane.heard) and time.monotonic() < give_up_at:
        time.sleep(0.01)
    assert plane.roster.pongs()["stage-1"].kv_tokens == 4
    assert plane.heard == [("stage-1", Progress(0, 1, 2, 3, 4))]
    assert not plane.roster.lost()


def test_what_cannot_be_sent_or_shown_does_not_end_the_plane(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """A request that cannot be encoded fails where it is made; a sink that raises harms nobody but itself."""
    worker.join("stage-1")
    with pytest.raises(ProtocolError, match="not valid unicode"):
        plane.begin("stage-1", Shutdown(0, "\udc80"))
    plane._on_progress = lambda _who, _what: 1 / 0
    worker.say(Progress(0, 1, 2, 3, 4))
    future = plane.begin("stage-1", Release(0, 1))
    worker.say(Released(worker.hear(Release).request_id, 1, 0))
    assert future.result(DEADLINE_S)[0].epoch == 1


def test_requests_for_nobody_and_for_too_long_are_not_kept(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """An absent worker's request is a loss at once; what ran into its deadline is not asked of its next process."""
    with pytest.raises(StageLost, match="stage-1 is not there"):
        plane.request("stage-1", Release(0, 1), 5)
    worker.join("stage-1")
    with pytest.raises(StageLost, match="did not answer"):
        plane.request("stage-1", Release(0, 1), 0.1)
    assert plane._requests == {}


def test_what_is_asked_while_a_worker_comes_again_is_not_lost(plane, worker, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Between the look at what was begun and the worker's admission nothing can be begun: it would reach nobody."""
    admit, begun = plane._admit, threading.Event()
    asking: list[threading.Thread] = []

    def slowly(sender, join):  # type: ignore[no-untyped-def]
        if asking or "stage-1" not in plane.roster.workers:
            return admit(sender, join)
        asking.append(threading.Thread(target=lambda: (plane.begin("stage-1", Release(0, 1)), begun.set())))
        asking[0].start()
        assert not begun.wait(0.3)
        return admit(sender, join)

    monkeypatch.setattr(plane, "_admit", slowly)
    worker.join("stage-1")
    worker.join("stage-1")
    asking[0].join()
    worker.hear(Release)


def test_a_silent_worker_is_lost(plane, worker, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Silence beyond the limit is reported with its length; nobody waits for ever."""
    worker.join("stage-1")
    monkeypatch.setattr(roster, "LOADING_SILENCE_LIMIT_S", 0.05)
    give_up_at = time.monotonic() + DEADLINE_S
    while not plane.roster.lost() and time.monotonic() < give_up_at:
        time.sleep(0.05)
    assert "silent" in plane.roster.lost()["stage-1"]


def test_a_worker_counts_as_serving_from_its_ready_on(plane, worker, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Before its next heartbeat says so, the short limit for silence holds; loading again, the long one."""
    monkeypatch.setattr(control, "HEARTBEAT_INTERVAL_S", 2 * roster.SILENCE_LIMIT_S)
    worker.join("stage-1")
    plane.roster.wait_for_joins(DEADLINE_S, lambda: None)
    assign = Assign(0, 1, 0, 1, "", None, "", 0, 1, "fp32", 1, "ipc:///nowhere", None, None, None, False)
    future = plane.begin("stage-1", assign)
    worker.say(Ready(worker.hear(Assign).request_id, 1, 1, 1, 0.1, "torch"))
    future.result(DEADLINE_S)
    plane._count_silence(2 * roster.SILENCE_LIMIT_S)
    assert "silent" in plane.roster.lost()["stage-1"]
    plane.begin("stage-1", assign)
    assert not plane.roster.lost()


def test_a_launch_that_was_stopped_does_not_blame_its_workers(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """However long one wait took (the process was suspended), it counts as one heartbeat of silence."""
    worker.join("stage-1")
    plane.roster.wait_for_joins(DEADLINE_S, lambda: None)
    plane._count_silence(3600.0)
    assert not plane.roster.lost()


def test_a_worker_that_says_goodbye_is_lost_at_once(plane, worker) -> None:  # type: ignore[no-untyped-def]
    """Leaving carries the reason."""
    worker.join("stage-1")
    worker.say(Leaving(0, "SIGTERM"))
    give_up_at = time.monotonic() + DEADLINE_S
    while not plane.roster.lost() and time.monotonic() < give_up_at:
        time.sleep(0.01)
    assert plane.roster.lost() == {"stage-1": "left: SIGTERM"}


def test_garbage_and_strangers_are_ignored(plane, worker, new_worker) -> None:  # type: ignore[no-untyped-def]
    """Random frames, and valid messages of somebody who never joined, change nothing."""
    stranger = new_worker()
    for frames in ([b""], [b"\xff" * 40], [b"a", b"b", b"c"], encode(Released(1, 1, 0)), encode(Leaving(0, "x"))):
        stranger.dealer.send_multipart(frames)
    assert isinstance(worker.join("stage-1"), Welcome)
    assert not plane.roster.lost()


def test_joins_have_a_deadline_and_a_watch(plane) -> None:  # type: ignore[no-untyped-def]
    """Absent workers are named; a check that raises ends the wait at once."""
    with pytest.raises(LaunchError, match="stage-1 did not join within 0 s"):
        plane.roster.wait_for_joins(0.2, lambda: None)

    def dead() -> None:
        raise LaunchError("stage 1 died")

    with pytest.raises(LaunchError, match="died"):
        plane.roster.wait_for_joins(60, dead)


def an_inspected(num_tokens: int, *shape: int) -> Reply:
    tensor = RawTensor("float32", shape, bytes(4 * math.prod(shape)))
    return Inspected(1, 1, 1, 0, "hidden", 0, num_tokens), (tensor,)


@pytest.mark.parametrize(
    "replies",
    [
        [an_inspected(4, 2, 3), an_inspected(6, 2, 3)],
        [an_inspected(4, 2, 3), an_inspected(4, 2, 4)],
        [an_inspected(4, 2, 3), an_inspected(4, 3, 3)],
        [an_inspected(4, 2, 3), an_inspected(4, 0, 3)],
        [an_inspected(4)],
    ],
)
def test_a_worker_that_sends_other_pieces_than_it_has_is_lost(replies: list[Reply]) -> None:
    """More and more tokens, other widths, too many, none, no rows at all: neither endless nor an error of ours."""
    with pytest.raises(StageLost, match="stage 1"):
        inspected_whole(lambda _: replies.pop(0), "stage 1")
