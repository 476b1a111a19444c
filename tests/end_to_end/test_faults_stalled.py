"""Workers that stop for a while, or for good, and clocks that jump: no token changes, nobody is replaced in vain."""

import contextlib
import os
import re
import signal
import time
from itertools import cycle
from pathlib import Path

import pytest
import torch
import zmq

from coordinator.roster import SILENCE_LIMIT_S
from protocol.data import Span, Step
from protocol.sockets import Socket, connect, data_socket, send
from protocol.torch_bridge import to_raw
from tests.end_to_end.faults import (
    DECODE,
    FOUR,
    ONE_GREEDY,
    PHASES,
    Launch,
    Phase,
    disturbed_launch,
    until,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STALL_S = 1.0


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_stopped_worker_is_replaced(launch: Launch, phase: Phase, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP is noticed by its silence within the limit, and the stopped process goes, too."""
    assert SILENCE_LIMIT_S < 3
    monkeypatch.setattr("coordinator.roster.SILENCE_LIMIT_S", SILENCE_LIMIT_S)
    pid = launch.pids[1]
    launch.must_survive(phase, FOUR, launch.hit(signal.SIGSTOP, 1))
    found = re.match(r"stage 2 \(cpu of this host, layers 3-4, pid (\d+)\) has been silent for (\S+) s", launch.told[0])
    assert found is not None, launch.told[0]
    assert int(found[1]) == pid
    assert float(found[2]) >= SILENCE_LIMIT_S  # told with one decimal
    assert not Path(f"/proc/{pid}").exists()


def test_a_worker_that_wakes_up_in_a_later_epoch_drops_what_it_had(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 3 is stopped with steps before it; stage 1 is replaced; stage 3 goes on and does none of those."""
    pid, cluster = launch.pids[2], launch.chat_model.cluster
    assign, epochs = cluster.assign, list[int]()

    def assign_and_wake() -> None:
        assign()
        epochs.append(cluster.epoch)
        os.kill(pid, signal.SIGCONT)

    def strike() -> None:
        epochs.append(cluster.epoch)
        monkeypatch.setattr(cluster, "assign", assign_and_wake)
        os.kill(pid, signal.SIGSTOP)
        launch.hit(signal.SIGKILL, 0)()

    launch.must_survive(DECODE, FOUR, strike)
    assert "stage 1 (cpu" in launch.told[0]
    assert launch.pids[2] == pid
    assert epochs == [epochs[0], epochs[0] + 1]


def test_frames_of_an_old_epoch_are_ignored_everywhere(launch: Launch) -> None:
    """What a replaced worker might still send, to each stage and to the coordinator, in the middle of an answer."""
    cluster = launch.chat_model.cluster
    endpoints = [join.data_endpoint for join in cluster.join()] + [cluster.pipeline.return_endpoint]
    context: zmq.Context[Socket] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, linger=0)
        pushes = [data_socket(context, zmq.PUSH) for _ in endpoints]
        for push, endpoint in zip(pushes, endpoints, strict=True):
            connect(push, endpoint)
        spans = tuple(Span(number, 0, 1, None, None) for number in range(1, 5))

        def say_old_things() -> None:
            for push in pushes:
                for step_id in range(1, 6):
                    send(push, Step(cluster.epoch - 1, step_id, (), spans, ()), (to_raw(torch.ones(4, 32)),))

        launch.lines.clear()
        launch.must_survive(DECODE, FOUR, say_old_things)
        until(
            lambda: all(
                any(f"[stage {n} " in line and "dropped step" in line for line in launch.lines) for n in (1, 2, 3)
            )
        )
    assert launch.told == []


def test_a_worker_that_answers_but_does_not_go_on_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes far longer than any before: the stage that it is at is named, replaced, and nothing changes."""
    marker = tmp_path / "marker"
    with disturbed_launch(tmp_path, "hangs-in-a-step", "stage-2", str(marker)) as launch:
        pids = launch.pids

        def strike() -> None:
            marker.touch()
            monkeypatch.setattr("coordinator.recovery.LEAST_PATIENCE_S", 4.0)  # for no step before or after that

        def hear(text: str) -> None:
            launch.told.append(text)
            monkeypatch.undo()

        launch.chat_model.supervisor.mender.on_event = hear
        launch.must_survive(DECODE, FOUR, strike)
        name = rf"stage 2 \(cpu of this host, layers 3-4, pid {pids[1]}\)"
        assert re.match(rf"{name} seems to be stuck: no stage answered for \d+ s, far longer", launch.told[0])
        assert [old == new for old, new in zip(pids, launch.pids, strict=True)] == [True, False, True]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_slow_stage_is_waited_for(launch: Launch, phase: Phase) -> None:
    """A stage that stalls for less than the limit is not replaced; nobody is told anything."""
    assert STALL_S < SILENCE_LIMIT_S
    pids = launch.pids

    def stall() -> None:
        os.kill(pids[2], signal.SIGSTOP)
        until(lambda: launch.silence_s(2) > STALL_S)
        os.kill(pids[2], signal.SIGCONT)

    launch.must_survive(phase, FOUR, stall)
    assert launch.told == []
    assert launch.pids == pids


def test_a_clock_that_jumps_moves_no_deadline(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's wall clock jumps by an hour, forth and back, all the time; then a worker is killed as well."""
    real_s = time.time
    jumps = cycle((0.0, 3600.0, -3600.0))
    monkeypatch.setattr(time, "time", lambda: real_s() + next(jumps))
    pids = launch.pids
    launch.must_survive(DECODE, FOUR, lambda: None)
    assert launch.told == [] and launch.pids == pids
    launch.must_survive(DECODE, ONE_GREEDY, launch.hit(signal.SIGKILL, 1))
    assert "SIGKILL" in launch.told[0] and len(launch.told) == 2


def test_a_workers_clock_may_jump(tmp_path: Path) -> None:
    """The same in a worker: it neither leaves nor falls silent."""
    with disturbed_launch(tmp_path, "clock-jumps", "stage-2", str(tmp_path / "marker")) as launch:
        pongs = launch.chat_model.cluster._control.roster.pongs

        def be_asked_three_times() -> None:
            for _ in range(3):
                last = pongs().get("stage-2")  # none before the first heartbeat
                until(lambda last=last: pongs().get("stage-2") is not last)

        launch.must_survive(DECODE, FOUR, be_asked_three_times)
        assert launch.told == []


def test_deadlines_are_kept_with_a_clock_that_cannot_jump() -> None:
    """Nothing but the ages of files and the dates in logs comes from the wall clock."""
    by_wall_clock = re.compile(r"\btime\.time\(|\btime_ns\(|datetime\.now\(|from time import")
    found = {
        path.relative_to(ROOT).as_posix()
        for package in ("coordinator", "stage_worker", "protocol", "glm")
        for path in (ROOT / package).rglob("*.py")
        if by_wall_clock.search(path.read_text(encoding="utf-8"))
    }
    ages, dates = (
        {"glm/layer_cache.py", "coordinator/commands/cache.py"},
        {"coordinator/log.py", "coordinator/which_launch.py", "glm/confined_program.py"},
    )
    assert found == ages | dates
