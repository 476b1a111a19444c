"""A coordinator and three workers on four hosts, and a stranger on a fifth: real TCP, real keys, real processes."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from glm.demo import demo_model_dir
from protocol.version import VERSION
from tests.multihost.hosts import DEADLINE_S, Host, hosts, why_not
from tests.multihost.lab import (
    NAMES,
    QUESTION,
    let_in,
    said,
    start_changed_worker,
    start_launch,
    start_worker,
    worker_options,
    write_plan,
)

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
    launch = start_launch(launching, plan, change="import coordinator.door as d; d.USED_TOKEN_S = 0.0")
    launch.wait_for("waiting for lab4")
    token = launch.log.partition("which asks for the token that is in ")[2].partition(", good once")[0]
    later = [start_worker(workers[1], launching), start_worker(workers[2], launching, "--token-file", token)]
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
    """A coordinator that is killed comes back to workers that load nothing.

    A revoked host loses its worker and joins with a new key; a key that is replaced costs no process anything.
    """
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
    assert running[1].process.wait(DEADLINE_S) == 4
    assert "revoked" in running[1].log
    launch.wait_for("left: the key of lab3 has been revoked")
    launch.wait_for("stage 2 (cpu of lab3, layers 3-4, pid ")
    launch.wait_for(", good once")
    token = launch.log.rpartition("which asks for the token that is in ")[2].partition(", good once")[0]
    said(workers[1], "keys", "new", "--replace")
    start_worker(workers[1], launching, "--token-file", token).wait_for("serving epoch")
    assert said(launching, "generate", "--connect", *QUESTION) == before

    old = said(workers[2], "keys", "show").strip()
    said(launching, "keys", "allow", "lab4", said(workers[2], "keys", "new", "--replace").strip())
    said(launching, "keys", "revoke", old)
    running[2].wait_for("joining with the new one")
    launch.wait_for("all stages serve again", count=2)
    assert said(launching, "generate", "--connect", *QUESTION) == before
    assert "these layers were still here" in running[2].log
    assert running[0].process.poll() is None and running[2].process.poll() is None


def test_a_worker_that_does_not_suit_is_refused_by_name(five: list[Host], plan: str) -> None:
    """Another release, protocol or model: both sides name host and reason; the launch waits for one that suits."""
    launching, *workers, _ = five
    said(launching, "keys", "new")
    for name, host in zip(NAMES, workers, strict=False):
        let_in(launching, name, host)
    launch = start_launch(launching, plan)
    launch.wait_for("waiting for lab3")
    host = workers[1]
    changes = (
        "import protocol.version as v; v.VERSION = '9.8.7'",
        "import protocol.version as v; v.PROTOCOL_VERSION = 99",
    )
    unfit = [start_changed_worker(host, launching, change, 7501 + n) for n, change in enumerate(changes)]
    unfit.append(host.start("worker", *worker_options(host, launching, 7509), "--model", "random:tiny"))
    fit = [start_worker(each, launching) for each in workers[:3]]
    assert [worker.process.wait(DEADLINE_S) for worker in unfit] == [4, 4, 4]
    release, protocol, model = unfit
    for log in (release.log, launch.log):
        assert f"of lab3 runs glmpipe 9.8.7, the coordinator {VERSION}: install the same version on both" in log
    assert "the coordinator is of another release" in protocol.log and "version 99" in protocol.log
    assert "refused a worker of lab3: " in launch.log and "version 99" in launch.log
    for log in (model.log, launch.log):
        assert re.search(r"random:tiny of lab3 has \d+ layers, the launched model demo model 6", log)
    launch.wait_for("serving at")
    assert all("serving epoch" in worker.log for worker in fit)


def test_files_that_differ_are_found_when_layers_are_assigned(five: list[Host], plan: str, tmp_path: Path) -> None:
    """On lab3 another model lies at the same place: the launch ends, naming host and reason; the worker stays."""
    launching, *workers, _ = five
    model, other = tmp_path / "model", tmp_path / "other"
    for directory in (model, other):
        shutil.copytree(demo_model_dir(), directory)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config, indent=1))
    said(launching, "keys", "new")
    for name, host in zip(NAMES, workers, strict=False):
        let_in(launching, name, host)
    places = f"mount --bind {other} {model} && exec "
    unfit = workers[1].command("-P", "-m", "coordinator", "worker", *worker_options(workers[1], launching))
    prefix, program = unfit[:4], unfit[4:]
    there = workers[1].start_program([*prefix, "sh", "-c", places + shlex.join(program)])
    fit = [start_worker(host, launching) for host in (workers[0], workers[2])]
    launch = start_launch(launching, plan, "--model", str(model))
    assert launch.process.wait(DEADLINE_S) == 1
    found = re.search(r"stage 2 \(cpu of lab3, layers 3-4, pid \d+\): (.*) is not the checkpoint", launch.log)
    assert found is not None and found[1] == str(model)
    assert "good once" not in launch.log and "serving at" not in launch.log
    assert [worker.process.poll() for worker in (there, *fit)] == [None] * 3
