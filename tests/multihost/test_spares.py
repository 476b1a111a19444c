"""A worker that stays away: a spare takes its place after the wait, or the requests fail and the launch stays up."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from coordinator.client import connect
from coordinator.errors import GenerationError
from protocol.client import SamplingParams, TextPrompt
from tests.multihost.hosts import Host, hosts, why_not
from tests.multihost.lab import Lab, let_in, start_worker, write_plan

REASON = why_not("ss")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

AWAIT_S = "4"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[tuple[Lab, Host]]:
    """And a host that the plan does not name."""
    with ExitStack() as stack:
        *named, other = stack.enter_context(hosts(tmp_path, 5))
        more = ("--await-worker", AWAIT_S, "--recovery-attempts", "50")
        yield Lab(named, write_plan(tmp_path), *more), other


def test_a_worker_that_stays_away(lab: tuple[Lab, Host]) -> None:
    """Its host sleeps for good: an error within the deadline, another at once, and answers when a spare joins.

    The host that wakes is a spare itself, holding no sequence, and goes on with four answers as the other is killed.
    When nobody is left to stand in, its own return is enough.
    """
    launch, other = lab
    wanted = launch.wanted(4, 7)
    with ExitStack() as stack:
        sleep = partial(stack.enter_context, launch.hosts[1].asleep())
        assert_no_answer(launch, rf"stage 2 \(cpu of lab3\) did not come back within {AWAIT_S} s", sleep)
        assert_no_answer(launch, r"stage 2 \(cpu of lab3\) is still awaited")
        let_in(launch.launching, "lab5", other)
        spare = start_worker(other, launch.launching)
        launch.launch.wait_for("all stages serve again")
        assert "cpu of lab5 has joined beyond the plan: held as a spare worker" in launch.launch.log
        assert "cpu of lab5, a spare worker, takes the place of stage 2 (cpu of lab3)" in launch.launch.log
        assert launch.answers(4, 7) == wanted
        assert "held as a spare" in spare.log and "layers 3-4" in spare.log
    launch.launch.wait_for("cpu of lab3 has joined beyond the plan: held as a spare worker")
    launch.workers[1].wait_for("held as a spare")

    assert launch.answers(4, 7, spare.process.kill) == wanted
    assert "cpu of lab3, a spare worker, takes the place of stage 2 (cpu of lab5)" in launch.launch.log
    assert "these layers were still here" in launch.workers[1].log

    with ExitStack() as stack:
        sleep = partial(stack.enter_context, launch.hosts[1].asleep())
        assert_no_answer(launch, rf"stage 2 \(cpu of lab3\) did not come back within {AWAIT_S} s", sleep)
    launch.launch.wait_for("all stages serve again", count=3)
    assert launch.answers(4, 7) == wanted
    launch.wait_for_connections()
    assert len(launch.launching.pids()) == 1 and other.pids() == []


def assert_no_answer(lab: Lab, why: str, fault: Callable[[], object] = lambda: None) -> None:
    """A request fails, for this reason; the fault comes once it is being answered."""
    sampling = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), 600, True, True)
    with connect(lab.endpoint) as client, pytest.raises(GenerationError, match=why):
        for number, _ in enumerate(client.stream(TextPrompt("What is 2 + 3? "), sampling)):
            if not number:
                fault()
