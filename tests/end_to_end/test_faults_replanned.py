"""Stages that are gone for good: with --replan the others take their layers, and answers go on token for token."""

import signal
from pathlib import Path

import pytest

from coordinator.errors import GenerationError
from coordinator.plan_request import PlanRequest, StageRequest
from coordinator.recovery import RecoveryPolicy
from tests.end_to_end.faults import DECODE, FOUR, ONE_GREEDY, PREFILL, SPECULATION, Launch, Phase, disturbed_launch

pytestmark = pytest.mark.slow

POLICY = RecoveryPolicy(max_attempts=1, first_delay_s=0.0, settled_s=0.0, replan=True)


def strike(launch: Launch, marker: Path, *stages: int) -> None:
    """Kill these stages, one of which does not come back."""
    marker.touch()
    launch.hit(signal.SIGKILL, *stages)()


@pytest.mark.parametrize(
    ("stage", "phase", "ranges"),
    [(0, SPECULATION, ["1-4", "5-6"]), (1, PREFILL, ["1-3", "4-6"]), (2, DECODE, ["1-2", "3-6"])],
    ids=["stage 1", "stage 2", "stage 3"],
)
def test_the_neighbours_take_the_layers_of_a_stage(tmp_path: Path, stage: int, phase: Phase, ranges: list[str]) -> None:
    """Three stages become two, and it is said what went where; then one more recovery, and another plan, follow."""
    marker = tmp_path / "marker"
    worker = ("dies-once-marked", f"stage-{stage + 1}", str(marker))
    with disturbed_launch(tmp_path, *worker, recovery=POLICY) as launch:
        launch.must_survive(phase, FOUR, lambda: strike(launch, marker, stage))
        assert [each.layers_text for each in launch.chat_model.cluster.plan.stages] == ranges
        (moved,) = (text for text in launch.told if "given up; its layers go to the other stages:" in text)
        assert f"stage {stage + 1} (cpu of this host, pid " in moved and "fallen off the bus" in moved
        assert f": from stage {stage + 1} (cpu of this host, fp32) to stage " in moved
        assert ("what was stage 3 is stage 2 now" in moved) == (stage < 2)
        assert "all stages serve again" in launch.told[-1] and "4 answers go on" in launch.told[-1]
        launch.must_survive(DECODE, ONE_GREEDY, launch.hit(signal.SIGKILL, 1))
        assert launch.told[0].startswith("stage 2 (cpu of this host")


def test_one_stage_can_be_all_that_is_left(tmp_path: Path) -> None:
    """Two of three are gone at once, or one after the other; the third has the whole model."""
    marker = tmp_path / "marker"
    policy = RecoveryPolicy(max_attempts=0, settled_s=0.0, replan=True)  # no second chance
    with disturbed_launch(tmp_path, recovery=policy) as launch:
        launch.must_survive(DECODE, FOUR, lambda: strike(launch, marker, 0, 2))
        assert [each.layers_text for each in launch.chat_model.cluster.plan.stages] == ["1-6"]
        (answer,) = launch.answers(DECODE, ONE_GREEDY)
        assert [stage.layers for stage in answer.close()[1].stats.stages] == ["1-6"]


def test_a_stage_that_cannot_load_again_is_replanned(tmp_path: Path) -> None:
    """Its worker lives, but there is no memory for its layers any more."""
    marker = tmp_path / "marker"
    with disturbed_launch(tmp_path, "no-memory-to-load", "stage-2", str(marker), recovery=POLICY) as launch:
        launch.must_survive(DECODE, FOUR, lambda: strike(launch, marker, 1))
        assert "no memory for layers 3-4" in "".join(launch.told)
        assert [each.layers_text for each in launch.chat_model.cluster.plan.stages] == ["1-3", "4-6"]


def test_too_little_room_is_a_clean_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests fail with what is missing where; the stage that came back at last serves the next ones."""
    marker = tmp_path / "marker"
    worker = ("dies-once-marked", "stage-2", str(marker))
    with disturbed_launch(tmp_path, *worker, recovery=POLICY) as launch:
        launch.wanted(DECODE, ONE_GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr("coordinator.memory.host_memory", lambda: (10**9, 10**5))
            answers = launch.answers(DECODE, FOUR, lambda: strike(launch, marker, 1))
        for answer in answers:
            assert isinstance(answer.sequence.error, GenerationError)
            text = str(answer.sequence.error)
            assert "stage 2 (cpu of this host" in text and "fallen off the bus" in text
            assert "--replan does not help: the other stages have no room: cpu of " in text and "are needed" in text
        assert launch.told[-1].startswith("given up: stage 2")
        marker.unlink()
        launch.must_survive(DECODE, ONE_GREEDY, lambda: None)
        assert len(launch.chat_model.cluster.plan.stages) == 3


def test_without_the_option_the_failure_names_it(tmp_path: Path) -> None:
    """Nothing moves unasked."""
    marker = tmp_path / "marker"
    policy = RecoveryPolicy(max_attempts=1, first_delay_s=0.0)
    with disturbed_launch(tmp_path, "dies-once-marked", "stage-3", str(marker), recovery=policy) as launch:
        for answer in launch.answers(DECODE, FOUR, lambda: strike(launch, marker, 2)):
            assert "with --replan, its layers go to the other stages" in str(answer.sequence.error)
        assert len(launch.chat_model.cluster.plan.stages) == 3


def test_layers_take_the_precision_of_where_they_go(tmp_path: Path) -> None:
    """Which is said; here from bf16 to fp32."""
    marker = tmp_path / "marker"
    plan = PlanRequest(
        (StageRequest("1", "cpu", "1-4", num_threads=1), StageRequest("2", "cpu", "5-6", "bf16", num_threads=1))
    )
    with disturbed_launch(tmp_path, recovery=RecoveryPolicy(max_attempts=0, replan=True), plan=plan) as launch:
        for answer in launch.answers(DECODE, ONE_GREEDY, lambda: strike(launch, marker, 1)):
            assert answer.sequence.error is None
        assert "from stage 2 (cpu of this host, bf16) to stage 1 (cpu of this host, fp32)" in "".join(launch.told)
