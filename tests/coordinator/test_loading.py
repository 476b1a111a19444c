"""Stages that load, side by side: which of them hang, and how that is told."""

from concurrent.futures import Future

import pytest

from coordinator.cluster_settings import StageProgress
from coordinator.errors import LaunchError, StageLost, WorkerDied
from coordinator.loading import Loading
from coordinator.plan import StagePlan
from coordinator.reply import Reply
from protocol.control import Failed, Pong, Progress, Ready
from protocol.records import with_changes

STAGES = (StagePlan("cpu", 0, 3, "fp32"), StagePlan("cpu", 3, 6, "fp32", host="lab3"))


def pong(moved_bytes: int) -> Pong:
    return Pong(0, "loading", 1, 0.0, 0, 0, 0, 0, 0, 0, moved_bytes)


def begun() -> tuple[Loading, list["Future[Reply]"]]:
    loading = Loading(lambda index: f"stage {index + 1}", None)
    requests: list[Future[Reply]] = [Future() for _ in STAGES]
    loading.begin(requests, STAGES, epoch=1)
    return loading, requests


def test_the_stage_that_hangs_is_named_with_its_layer() -> None:
    """One reads on from a slow disk, the other only answers; one that is ready has all time of the world."""
    loading, requests = begun()
    loading.note(1, Progress(0, 1, 1, 3, 100))
    for second in range(121):
        assert loading.stuck(1.0, {0: pong(second * 2**20), 1: pong(second * 200)}) == {}
    found = loading.stuck(1.0, {0: pong(2**30), 1: pong(2**14)})
    assert list(found) == [1] and found[1].startswith("hangs in layer 5: it answers") and "for 121 s" in found[1]
    requests[1].set_result((Ready(1, 1, 1, 1, 1.0, "torch"), ()))
    assert loading.stuck(1.0, {}) == {}


def test_a_stage_that_serves_without_a_word_is_lost() -> None:
    """Its heartbeats say that it serves in this epoch, its answer never came; that it serves in another is nothing."""
    loading, _ = begun()
    serving = Pong(0, "serving", 1, 0.0, 0, 0, 0, 0, 0, 0, 0)
    for _ in range(10):
        assert loading.stuck(1.0, {0: serving, 1: with_changes(serving, epoch=7)}) == {}
    found = loading.stuck(1.0, {0: serving, 1: with_changes(serving, epoch=7)})
    assert found == {0: "says that it serves, and has not answered its assignment for 10 s since"}


def test_what_is_waited_for_is_told_with_how_far_it_is() -> None:
    """Those that are ready are not waited for."""
    loading, requests = begun()
    loading.note(0, Progress(0, 1, 2, 3, 100))
    assert loading.waits_for() == "stage 1 (2 of 3 layers), stage 2 (0 of 3 layers) to load"
    requests[0].set_result((Ready(1, 1, 1, 1, 1.0, "torch"), ()))
    assert loading.waits_for() == "stage 2 (0 of 3 layers) to load"
    requests[1].set_result((Ready(1, 1, 1, 1, 1.0, "torch"), ()))
    assert loading.waits_for() is None
    assert [ready.epoch for ready in loading.wait(lambda _: None)] == [1, 1]


def test_a_wait_ends_with_what_went_wrong() -> None:
    """A stage that cannot is remembered; a lost one is a worker that died while loading; waits are told in seconds."""
    loading, requests = begun()
    waits: list[float] = []

    def lose(waited_s: float) -> None:
        waits.append(waited_s)
        raise StageLost("stage 2 ended with signal SIGKILL while serving")

    with pytest.raises(WorkerDied, match="SIGKILL while loading"):
        loading.wait(lose)
    assert 0.0 <= waits[0] <= 0.1
    requests[1].set_result((Failed(1, 1, "out_of_memory", "no memory"), ()))
    with pytest.raises(LaunchError, match="stage 2: no memory"):
        loading.wait(lambda _: None)
    assert loading.could_not == {1}


def test_only_progress_counts_as_progress() -> None:
    """A worker that says the same again and again, more than there is, or of another epoch, is heard once a layer."""
    heard: list[StageProgress] = []
    loading, requests = Loading(lambda index: f"stage {index + 1}", heard.append), [Future[Reply]() for _ in STAGES]
    loading.note(0, Progress(0, 1, 1, 3, 100))  # before anything was assigned
    loading.begin(requests, STAGES, epoch=1)
    for layers in (0, 0, 1, 1, 0, 2, 2**31 - 1, 4, 3, 3):
        for _ in range(100):
            loading.note(0, Progress(0, 1, layers, 3, 100))
    loading.note(1, Progress(0, 2, 1, 3, 100))
    loading.note(1, Progress(0, 1, 1, 1_000_000, 100))
    assert [(each.stage_index, each.layers_done) for each in heard] == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_stage_that_is_ready_for_something_else_is_not_ready() -> None:
    """Of another epoch than the one assigned; and it has loaded for no longer than it had time."""
    loading, requests = begun()
    requests[0].set_result((Ready(1, 1, 1, 1, 1e12, "torch"), ()))
    requests[1].set_result((Ready(1, 7, 1, 1, 1.0, "torch"), ()))
    with pytest.raises(LaunchError, match="stage 2 is ready in epoch 7, 1 was assigned"):
        loading.wait(lambda _: None)
    assert loading.could_not == {1} and loading._ready[0].load_s < 60.0
