"""A coordinator and three workers on four hosts, and a stranger on a fifth: real TCP, real keys, real processes."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.multihost.hosts import DEADLINE_S, Host, hosts, why_not
from tests.multihost.lab import NAMES, QUESTION, let_in, said, start_launch, start_worker, write_plan

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

STRANGER = Path(__file__).with_name("stranger.py")


@pytest.fixture
def five(tmp_path: Path) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        yield stack.enter_context(hosts(tmp_path, 5))


@pytest.fixture
def plan(tmp_path: Path) -> str:
    return write_plan(tmp_path)


def test_four_hosts_compute_what_one_process_does(five: list[Host], plan: str) -> None:
    """The same tokens; one worker comes before the coordinator, one after it, one by a token. Then a stranger looks."""
    launching, *workers, stranger = five
    said(launching, "keys", "new")
    let_in(launching, "lab2", workers[0])
    let_in(launching, "lab3", workers[1])
    alone = said(stranger, "generate", *QUESTION)
    early = start_worker(workers[0], launching)
    places = ("--layers", "lab2/cpu=1-4", "--layers", "cpu=5-6", "--listen", f"tcp://{launching.address}")
    assert said(launching, "generate", *places, *QUESTION) == alone
    launch = start_launch(launching, plan)
    launch.wait_for("waiting for lab4")
    token = launch.log.partition("--token ")[2].split()[0]
    later = [start_worker(workers[1], launching), start_worker(workers[2], launching, "--token", token)]
    launch.wait_for("serving at")
    for worker in (early, *later):
        worker.wait_for("serving epoch")

    assert said(launching, "generate", "--connect", *QUESTION) == alone
    assert "lab4" in said(launching, "keys", "list")

    key = said(launching, "keys", "show").strip()
    targets = [f"{launching.address}={key}", *(worker.address for worker in workers)]
    scan = subprocess.run(
        stranger.command(str(STRANGER), *targets), capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    report = json.loads(scan.stdout)
    declared = {launching.address: {"7410", "7411"}, **{worker.address: {"7500"} for worker in workers}}
    assert {address: set(ports) for address, ports in report.items()} == declared
    for ports in report.values():
        for answers in ports.values():
            assert "READY" not in answers["null"] and "WELCOME" not in answers["null"]
            assert answers["curve"] is False
    assert said(launching, "generate", "--connect", *QUESTION) == alone


def test_workers_keep_their_weights_for_the_next_coordinator(five: list[Host], plan: str) -> None:
    """A coordinator that is killed comes back to workers that load nothing; a revoked one is replaced by a new key."""
    launching, *workers, _ = five
    said(launching, "keys", "new")
    running = []
    for name, host in zip(NAMES, workers, strict=False):
        let_in(launching, name, host)
        running.append(start_worker(host, launching))
    launch = start_launch(launching, plan)
    launch.wait_for("serving at")
    before = said(launching, "generate", "--connect", *QUESTION)
    launch.process.kill()
    launch.process.wait()

    launch = start_launch(launching, plan)
    launch.wait_for("serving at")
    for worker in running:
        worker.wait_for("these layers were still here")
        worker.wait_for("serving epoch", count=2)
    assert said(launching, "generate", "--connect", *QUESTION) == before

    said(launching, "keys", "revoke", "lab3")
    assert running[1].process.wait(DEADLINE_S) == 2
    assert "revoked" in running[1].log
    launch.wait_for("left: the key of lab3 has been revoked")
    launch.wait_for("stage 2 (cpu of lab3, layers 3-4, pid ")
    launch.wait_for("--token")
    token = launch.log.partition("--token ")[2].split()[0]
    said(workers[1], "keys", "new", "--replace")
    start_worker(workers[1], launching, "--token", token).wait_for("serving epoch")
    assert said(launching, "generate", "--connect", *QUESTION) == before
    assert running[0].process.poll() is None and running[2].process.poll() is None


def test_another_model_is_refused_by_name(five: list[Host], plan: str) -> None:
    """A worker with other files than the coordinator's ends the launch, which names its host and the reason."""
    launching, *workers, _ = five
    said(launching, "keys", "new")
    for name, host in zip(NAMES, workers, strict=False):
        let_in(launching, name, host)
        start_worker(host, launching, *(("--model", "random:tiny") if name == "lab3" else ()))
    launch = start_launch(launching, plan)
    assert launch.process.wait(DEADLINE_S) == 1
    assert re.search(
        r"stage 2 \(cpu of lab3, layers 3-4, pid \d+\): random:tiny is not the checkpoint the coordinator sees",
        launch.log,
    )
    for words in ("--token", "serving at"):
        assert words not in launch.log
