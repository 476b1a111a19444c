"""A host that does not come back: with --replan the others take its layers, and the answers go on."""

from pathlib import Path

import pytest

from tests.multihost.hosts import hosts, why_not
from tests.multihost.lab import Lab, start_worker, write_plan

REASON = why_not("ss")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def test_other_hosts_take_the_layers_of_one_that_is_gone(tmp_path: Path) -> None:
    """Same tokens; the log says what went where; a worker that comes back after that is a spare one."""
    with hosts(tmp_path, 4) as machines:
        lab = Lab(machines, write_plan(tmp_path), "--await-worker", "2", "--replan")
        wanted = lab.wanted(4, 7)
        assert lab.answers(4, 7, lab.workers[1].process.kill) == wanted
        lab.launch.wait_for("layers 3: from stage 2 (cpu of lab3, fp32) to stage 1 (cpu of lab2, fp32)")
        lab.launch.wait_for("layers 4: from stage 2 (cpu of lab3, fp32) to stage 2 (cpu of lab4, fp32)")
        lab.launch.wait_for("what was stage 3 is stage 2 now")
        start_worker(lab.hosts[1], lab.launching)
        lab.launch.wait_for("held as a spare worker")
        assert lab.answers(4, 7) == wanted
