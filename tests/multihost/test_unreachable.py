"""A worker that reaches the launch but not the next worker: found before the launch says that it serves."""

import re
from pathlib import Path

import pytest

from tests.multihost.hosts import hosts, why_not
from tests.multihost.lab import NAMES, let_in, start_launch, start_worker, write_plan

REASON = why_not("ss")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def test_a_data_port_that_cannot_be_reached_is_named_and_tried_again(tmp_path: Path) -> None:
    """No request waits for it: the hop and its address are in the log, and when the way is free the launch serves."""
    with hosts(tmp_path, 4) as (launching, *others):
        launching.keys.make_own()
        for name, host in zip(NAMES, others, strict=True):
            let_in(launching, name, host)
        sooner = "import coordinator.first_step as f; f.FIRST_STEP_S = 10.0"
        launch = start_launch(launching, write_plan(tmp_path), change=sooner)
        with others[0].cut_off_from(others[1]):
            for host in others:
                start_worker(host, launching)
            launch.wait_for("(attempt 1 of 5)")
            assert "serving at" not in launch.log
        hop = r"lost between stage 1 \(cpu of lab2,.*\) and stage 2 \(cpu of lab3,.*\): can tcp://(\S+):7500 be reached"
        found = re.search(hop, launch.log)
        assert found is not None and found[1] == others[1].address, launch.log
        launch.wait_for("all stages serve, in epoch")
        launch.wait_for("serving at")
