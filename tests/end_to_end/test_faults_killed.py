"""Workers that are killed while they serve: every answer ends with exactly the tokens it would have had."""

import re
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.end_to_end.faults import (
    DECODE,
    FOUR,
    ONE_GREEDY,
    ONE_SEEDED,
    PREFILL,
    SPECULATION,
    Launch,
    Phase,
    disturbed_launch,
    until,
)

pytestmark = pytest.mark.slow

PHASES = [PREFILL, DECODE, SPECULATION]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """One for all faults: each finds it as the recovery before left it."""
    with disturbed_launch(tmp_path_factory.mktemp("launch")) as launch:
        yield launch


@pytest.mark.parametrize("is_one", [True, False], ids=["one", "four, greedy and seeded"])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
@pytest.mark.parametrize("stage", [0, 1, 2], ids=["stage 1", "stage 2", "stage 3"])
def test_a_killed_worker_changes_no_token(launch: Launch, stage: int, phase: Phase, is_one: bool) -> None:
    """SIGKILL of each stage, while prompts are fed, while tokens come one by one, and while drafts are verified.

    One request alone is greedy or seeded in turns, so that each stage and each phase has both.
    """
    seeds = FOUR if not is_one else (ONE_GREEDY, ONE_SEEDED)[(stage + PHASES.index(phase)) % 2]
    launch.must_survive(phase, seeds, launch.hit(signal.SIGKILL, stage))
    assert f"stage {stage + 1} (cpu" in launch.told[0] and "SIGKILL while serving" in launch.told[0]
    num_answers = "1 answer goes on" if len(seeds) == 1 else f"{len(seeds)} answers go on"
    assert "all stages serve again after" in launch.told[-1] and num_answers in launch.told[-1]
    assert len(launch.told) == 2


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_two_killed_at_once_change_no_token(launch: Launch, phase: Phase) -> None:
    """Both are started again by one recovery, or one after the other."""
    stages = [(0, 2), (1, 2), (0, 1)][PHASES.index(phase)]
    launch.must_survive(phase, FOUR, launch.hit(signal.SIGKILL, *stages))
    assert any(f"stage {stage + 1} (cpu" in launch.told[0] for stage in stages)
    assert "all stages serve again" in launch.told[-1]


def test_a_worker_that_is_told_to_end_is_replaced(launch: Launch) -> None:
    """SIGTERM, as a service manager or an administrator sends it: the worker says goodbye."""
    launch.must_survive(DECODE, FOUR, launch.hit(signal.SIGTERM, 1))
    name = r"stage 2 \(cpu of this host, (layers 3-4, )?pid \d+\)"
    assert re.match(rf"{name} (left: SIGTERM|ended with exit code 0 while serving)", launch.told[0])
    assert "all stages serve again" in launch.told[-1]


def test_a_worker_killed_while_nobody_asks_is_replaced(launch: Launch) -> None:
    """What looks after an idle launch finds and mends it; the next answer is as ever."""
    launch.told.clear()
    launch.hit(signal.SIGKILL, 0)()
    supervisor = launch.chat_model.supervisor
    until(lambda: supervisor.check() or "all stages serve again" in "".join(launch.told))  # type: ignore[func-returns-value]
    launch.must_be_whole()


def test_a_worker_killed_again_while_it_comes_back_is_tried_again(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replacement dies, too, while it starts: another attempt brings it back."""
    told = launch.told

    def kill_the_next_one(text: str) -> None:
        told.append(text)
        if len(told) == 1:
            threading.Thread(target=strike).start()

    def strike() -> None:
        launcher = launch.chat_model.cluster._launcher
        old = launcher._workers[1]._process.pid
        while launcher._workers[1]._process.pid == old:
            time.sleep(0.01)
        launcher._workers[1].signal(signal.SIGKILL)

    monkeypatch.setattr(launch.chat_model.supervisor.mender, "on_event", kill_the_next_one)
    launch.must_survive(DECODE, ONE_GREEDY, launch.hit(signal.SIGKILL, 1))
    assert any("attempt 2" in text for text in told)
