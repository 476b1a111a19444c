"""`--connect` never picks one of several launches in silence."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import which_launch
from coordinator.cli import main
from coordinator.errors import ConnectError, UsageError
from coordinator.reception import Reception
from coordinator.runtime_dir import CLIENT_SOCKET, RunningLaunch, RuntimeDir, find_running
from coordinator.which_launch import endpoint_of
from tests.coordinator.test_client import FakeLaunch, answering


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunningLaunch]]:
    """Pids 11 and 12 serve, 13 is still loading; a test says which of them run."""
    found: list[RunningLaunch] = []
    monkeypatch.setattr(which_launch, "find_running", lambda **_: tuple(found))
    serving = [FakeLaunch(f"ipc://{tmp_path}/{pid}", answering) for pid in (11, 12)]
    try:
        with Reception() as reception:
            reception.open(f"ipc://{tmp_path}/13", lambda: "stage 1 to load")
            found += [RunningLaunch(pid, f"ipc://{tmp_path}/{pid}", 86400.0) for pid in (11, 12, 13)]
            yield found
    finally:
        for launch in serving:
            launch.close()


def test_the_only_one_is_meant_whatever_it_does(launches: list[RunningLaunch]) -> None:
    """One that loads will be waited for."""
    for launch in (launches[0], launches[2]):
        launches[:] = [launch]
        assert endpoint_of(None) == launch.endpoint


def test_the_only_one_that_serves_is_meant(launches: list[RunningLaunch]) -> None:
    """The other one is still loading."""
    del launches[0]
    assert endpoint_of(None, ask_s=60) == launches[0].endpoint


def test_several_are_listed_with_what_to_write(launches: list[RunningLaunch]) -> None:
    """Pid, model, since when; what a loading one waits for. The pid, or the endpoint, is an answer to it."""
    with pytest.raises(UsageError, match="3 launches are running; say which one is meant:") as caught:
        endpoint_of(None, ask_s=60)
    _, first, second, third = str(caught.value).splitlines()
    assert re.fullmatch(r"  --connect 11  model \(chatglm2\), since 1970-01-0\d \d\d:\d\d", first)
    assert second.startswith("  --connect 12  model")
    assert third.startswith("  --connect 13  still loading, since ")
    assert "it waits for stage 1 to load, for " in third
    assert endpoint_of("12") == endpoint_of(launches[1].endpoint) == launches[1].endpoint
    assert endpoint_of(launches[1].endpoint.removeprefix("ipc://")) == launches[1].endpoint


def test_one_that_says_nothing_may_be_meant(launches: list[RunningLaunch], tmp_path: Path) -> None:
    """It may compute a long prompt: the other one is not picked because of that."""
    launches[1:] = [RunningLaunch(14, f"ipc://{tmp_path}/14")]
    with pytest.raises(UsageError, match=r"--connect 14  since .*; it does not say what it is"):
        endpoint_of(None, ask_s=0.3)


@pytest.mark.usefixtures("launches")
def test_a_pid_that_no_launch_has() -> None:
    """Those that run are named."""
    with pytest.raises(ConnectError, match="has the pid 99; those that run: 11, 12, 13"):
        endpoint_of("99")
    for wrong in ("lab2", "", 5, b"x"):
        with pytest.raises(UsageError, match=r"no endpoint|must be a text"):
            endpoint_of(wrong)  # type: ignore[arg-type]


def test_a_launch_of_this_place_hides_those_of_others(base: Path) -> None:
    """Where XDG_RUNTIME_DIR has one, it is the one that is meant, whatever runs in /tmp; two of them are a mistake."""
    with RuntimeDir() as one, RuntimeDir() as other:
        fakes = [FakeLaunch(one.endpoint(CLIENT_SOCKET), answering)]
        try:
            (mine,) = find_running()
            assert (mine.pid, endpoint_of(None)) == (os.getpid(), one.endpoint(CLIENT_SOCKET))
            assert mine.since_s == (one.path / "lock").stat().st_ctime
            fakes.append(FakeLaunch(other.endpoint(CLIENT_SOCKET), answering))
            assert len(find_running()) == 2
            assert main(["generate", "--ids", "5", "--connect"]) == 2
        finally:
            for fake in fakes:
                fake.close()
    assert list(base.iterdir()) == []
