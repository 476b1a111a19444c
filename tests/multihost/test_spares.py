"""A worker that stays away: a spare takes its place after the wait, or the requests fail and the launch stays up."""

from collections.abc import Iterator
from contextlib import ExitStack
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
    """Its host sleeps for good: an error within the deadline, another at once, and an answer when it is back.

    Then a spare joins, the host sleeps again in the middle of four answers, and the spare goes on with them; the host
    that wakes is a spare itself, holding no sequence, and takes over from the other one as that is killed.
    """
    launch, other = lab
    wanted = launch.answers(4, 7)
    hello = TextPrompt("What is 2 + 3? "), SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), 8, True, True)
    with launch.hosts[1].asleep(), connect(launch.endpoint) as client:
        with pytest.raises(GenerationError, match=rf"stage 2 \(cpu of lab3\) did not come back within {AWAIT_S} s"):
            list(client.stream(*hello))
        with pytest.raises(GenerationError, match=r"stage 2 \(cpu of lab3\) is still awaited"):
            list(client.stream(*hello))
    launch.launch.wait_for("all stages serve again")
    assert launch.answers(4, 7) == wanted
    assert "these layers were still here" in launch.workers[1].log

    let_in(launch.launching, "lab5", other)
    spare = start_worker(other, launch.launching)
    launch.launch.wait_for("cpu of lab5 has joined beyond the plan: held as a spare worker")
    spare.wait_for("held as a spare")
    with ExitStack() as asleep:
        found = launch.answers(4, 7, lambda: asleep.enter_context(launch.hosts[1].asleep()))
        assert found == wanted
        assert "cpu of lab5, a spare worker, takes the place of stage 2 (cpu of lab3)" in launch.launch.log
        assert "layers 3-4" in spare.log
    launch.launch.wait_for("cpu of lab3 has joined beyond the plan: held as a spare worker")
    launch.workers[1].wait_for("held as a spare")

    assert launch.answers(4, 7, spare.process.kill) == wanted
    assert "cpu of lab3, a spare worker, takes the place of stage 2 (cpu of lab5)" in launch.launch.log
    launch.wait_for_connections()
    assert len(launch.launching.pids()) == 1 and other.pids() == []
