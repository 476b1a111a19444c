"""Cables that drop, directions that die, hosts that sleep: the answer goes on with the tokens it would have had."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from coordinator.client import connect
from coordinator.roster import SILENCE_LIMIT_S
from protocol.client import Finished, SamplingParams, TextPrompt
from tests.commands import PATIENT
from tests.multihost.hosts import Host, hosts, why_not
from tests.multihost.lab import Lab, write_plan

REASON = why_not("tc", "ss")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

SHORT_S = 1.0
LONG_S = 4.0
AWAITED = "waiting 60 s at most for it to come back (attempt "
Fault = Callable[[Host], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One for all faults, since each is to leave it as it was."""
    directory = tmp_path_factory.mktemp("lab")
    more = ("--recovery-attempts", "50")
    with ExitStack() as stack:
        yield Lab(stack.enter_context(hosts(directory, 4)), write_plan(directory), *more)


def for_a_while(fault: Fault, host: Host, seconds: float) -> Callable[[], None]:
    """Begins now; ends so many seconds later, whatever else there is to do. Answers wait to be read meanwhile."""

    def begin() -> None:
        with fault(host):
            time.sleep(seconds)

    return begin


def until_lost(lab: Lab, fault: Fault, host: Host) -> Callable[[], None]:
    """Begins now, ends when the launch has missed that host's stage."""
    said_so = lab.launch.log.count(AWAITED)

    def begin() -> None:
        with fault(host):
            lab.launch.wait_for(AWAITED, count=said_so + 1)

    return begin


def test_a_short_interruption_is_not_noticed(tmp_path: Path) -> None:
    """A cable that is back within detection: the answers go on, nothing is lost, nobody is told anything.

    How soon TCP goes on after that, on a busy machine, is another matter: the launch has patience.
    """
    assert SHORT_S < SILENCE_LIMIT_S
    with hosts(tmp_path, 4) as machines:
        lab = Lab(machines, write_plan(tmp_path), change=PATIENT)
        wanted = lab.wanted(4, 7)
        assert lab.answers(4, 7, for_a_while(Host.unplugged, lab.hosts[1], SHORT_S)) == wanted
        assert "[pipeline]" not in lab.launch.log
        lab.wait_for_connections()


@pytest.mark.parametrize(
    ("fault", "num_answers"),
    [(Host.unplugged, 1), (Host.unplugged, 4), (Host.deaf, 4), (Host.mute, 1), (Host.asleep, 4)],
)
def test_a_lost_host_comes_back_by_itself(lab: Lab, fault: Fault, num_answers: int) -> None:
    """The stage counts as lost and is awaited; its worker joins again, weights in memory, and no token differs."""
    seed = None if num_answers == 1 else 7
    wanted = lab.wanted(num_answers, seed)
    events = lab.launch.log.count("all stages serve again")
    assert lab.answers(num_answers, seed, until_lost(lab, fault, lab.hosts[1])) == wanted
    assert re.search(r"stage 2 \(cpu of lab3, layers 3-4, pid \d+\) has been silent", lab.launch.log)
    assert lab.launch.log.count("all stages serve again") == events + 1
    worker = lab.workers[1]
    assert worker.log.count("these layers were still here") == worker.log.count("serving epoch") - 1
    lab.wait_for_connections()


def test_clients_are_answered_while_a_host_is_awaited(lab: Lab) -> None:
    """One cancels and has the end of its answer, another connects, hears what is awaited, and is answered later."""
    said_so = lab.launch.log.count(AWAITED)
    endless = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), 600, True, True)
    told: list[object] = []
    with connect(lab.endpoint) as leaving:
        asking = threading.Thread(target=lambda: told.extend(leaving.stream(TextPrompt("What is 2 + 3? "), endless)))
        with lab.hosts[1].unplugged():
            asking.start()
            lab.launch.wait_for(AWAITED, count=said_so + 1)
            while asking.is_alive():
                leaving.cancel()
                asking.join(0.1)
            with connect(lab.endpoint) as coming:
                waits_for = coming.describe().waits_for
    assert isinstance(told[-1], Finished) and told[-1].finish_reason == "cancelled"
    assert waits_for is not None and "stage 2 (cpu of lab3" in waits_for
    assert lab.answers(1, None) == lab.wanted(1, None)
    lab.wait_for_connections()


def test_a_dead_hop_between_two_stages_is_found_by_the_steps(lab: Lab) -> None:
    """All workers answer the launch, but hidden states do not get from one to the next: the step counts as stuck."""
    wanted = lab.wanted(1, None)
    assert lab.answers(1, None, until_lost(lab, lambda host: host.cut_off_from(lab.hosts[1]), lab.hosts[0])) == wanted
    hop = r"a step got lost between stage 1 \(cpu of lab2,.*\) and stage 2 \(cpu of lab3,.*\): can tcp://\S+:7500 be"
    assert re.search(f"all stages have been idle for 10 heartbeats, while it was under way; {hop}", lab.launch.log)
    assert "these layers were still here" in lab.workers[1].log
    lab.wait_for_connections()


def test_a_dead_cable_is_found_at_both_ends(lab: Lab) -> None:
    """Nobody asks anything, no packet says goodbye: both hosts give the connections up, and make new ones later."""
    host = lab.hosts[2]
    events = lab.launch.log.count("all stages serve again")
    with host.unplugged():
        lab.wait_for_connections(3, 3, 2, 0)  # lab3's way onwards went to lab4
    lab.launch.wait_for("all stages serve again", count=events + 1)
    assert lab.workers[2].log.count("these layers were still here") == lab.workers[2].log.count("serving epoch") - 1
    lab.wait_for_connections()


def test_a_coordinator_that_slept_goes_on(lab: Lab) -> None:
    """The launching host stands still for longer than it would wait for others: it listens before it judges."""
    assert LONG_S > SILENCE_LIMIT_S
    wanted = lab.wanted(1, None)
    events = lab.launch.log.count("[pipeline]")
    assert lab.answers(1, None, for_a_while(Host.asleep, lab.launching, LONG_S)) == wanted
    assert lab.launch.log.count("[pipeline]") == events
    lab.wait_for_connections()


def test_nobody_was_left_behind(lab: Lab) -> None:
    """After all that the same processes serve: one worker a host, the launch alone on its own."""
    assert [len(host.pids()) for host in (lab.launching, *lab.hosts)] == [1, 1, 1, 1]
    assert all(worker.process.poll() is None for worker in lab.workers)
