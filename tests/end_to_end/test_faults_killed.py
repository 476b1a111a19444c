"""Workers that are killed while they serve: every answer ends with exactly the tokens it would have had."""

import re
import signal

import pytest

from tests.end_to_end.faults import DECODE, FOUR, ONE_GREEDY, ONE_SEEDED, PHASES, Launch, Phase, until

pytestmark = pytest.mark.slow


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

    def strike() -> None:
        launch.hit(signal.SIGTERM, 1)()
        until(lambda: launch.misses(1))  # it may take the answer's last step before it looks at its signals

    launch.must_survive(DECODE, FOUR, strike)
    name = r"stage 2 \(cpu of this host, (layers 3-4, )?pid \d+\)"
    assert re.match(rf"{name} (left: SIGTERM|ended with exit code 143 while serving)", launch.told[0])
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
    launcher = launch.chat_model.cluster._launcher
    restart, restarted = launcher.restart, list[int]()

    def start_and_kill_the_first(index: int) -> None:
        restart(index)
        restarted.append(index)
        if len(restarted) == 1:
            launcher._workers[index].signal(signal.SIGKILL)

    monkeypatch.setattr(launcher, "restart", start_and_kill_the_first)
    launch.must_survive(DECODE, ONE_GREEDY, launch.hit(signal.SIGKILL, 1))
    assert restarted == [1, 1]
    assert "attempt 1" in launch.told[0] and "attempt 2" in launch.told[1] and len(launch.told) == 3
