"""Every way a worker process ends: its exit code, its last words, and nothing left behind."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from protocol.control import Leaving, Refused, Shutdown
from tests.stage_worker.fake_coordinator import FakeCoordinator, FakeWorker, fake_coordinator


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    """A coordinator without workers."""
    with fake_coordinator() as coordinator:
        yield coordinator


def left_behind(coordinator: FakeCoordinator) -> set[str]:
    """Files in the private directory that are not the coordinator's own."""
    return {path.name for path in coordinator.directory.iterdir() if not path.name.startswith("log-")} - {
        "control",
        "data",
    }


def shut_down(worker: FakeWorker) -> str:
    """Ask politely."""
    worker.post(Shutdown(8, "no more work"))
    return "no more work"


def send_sigterm(worker: FakeWorker) -> str:
    """As a supervisor does."""
    worker.process.send_signal(signal.SIGTERM)
    return "SIGTERM"


def send_sigint(worker: FakeWorker) -> str:
    """As a terminal does."""
    worker.process.send_signal(signal.SIGINT)
    return "SIGINT"


@pytest.mark.parametrize(("end", "code"), [(shut_down, 0), (send_sigterm, 143), (send_sigint, 130)])
def test_asked_to_leave(coordinator: FakeCoordinator, end: Callable[[FakeWorker], str], code: int) -> None:
    """Shutdown and signals: a goodbye that says why, the exit code of that, no socket file."""
    worker = coordinator.spawn()
    coordinator.admit(worker)
    assert worker.ping().state == "idle"
    assert left_behind(coordinator) == {f"worker-{worker.process.pid}"}
    reason = end(worker)
    goodbye, _ = worker.next_message()
    assert isinstance(goodbye, Leaving)
    assert goodbye.reason == reason
    assert goodbye.request_id == (8 if end is shut_down else 0)
    assert worker.wait() == code
    assert left_behind(coordinator) == set()
    assert len(worker.log.splitlines()) == 2


def test_lost_and_refused(coordinator: FakeCoordinator) -> None:
    """A silent coordinator, one that never answers, and a refusal: their exit codes and one line each."""
    stranger = coordinator.spawn("--join-timeout", "0.5")
    assert stranger.wait() == 3
    assert "no coordinator answered at ipc://" in stranger.log.splitlines()[-1]
    orphan = coordinator.spawn()
    coordinator.admit(orphan, orphan_timeout_s=0.5)
    refused = coordinator.spawn()
    assert orphan.wait() == 3
    assert "the coordinator has been silent for 0.5 s" in orphan.log.splitlines()[-1]
    coordinator.admit(refused, answer=Refused(1, "version", "install the same version on both"))
    assert refused.wait() == 4
    assert "refused by the coordinator (version): install the same" in refused.log.splitlines()[-1]
    assert left_behind(coordinator) == set()


def test_the_launcher_died(coordinator: FakeCoordinator) -> None:
    """When the lifeline ends, the worker leaves and takes the launch's private directory along."""
    read_end, write_end = os.pipe()
    worker = coordinator.spawn("--lifeline-fd", str(read_end), pass_fds=(read_end,))
    os.close(read_end)
    coordinator.admit(worker)
    os.close(write_end)
    assert worker.wait() == 3
    assert not coordinator.directory.exists()


def test_bad_options_and_devices(coordinator: FakeCoordinator) -> None:
    """What the command line cannot mean is said in words, exit code 2, without a traceback."""
    unknown = coordinator.spawn("--device", "tpu")
    absent = coordinator.spawn("--device", "cuda:999")
    remote = coordinator.spawn("--join", "tcp://example.org:5555")
    for worker, words in (
        (unknown, "device 'tpu' is unknown: use cpu or cuda:N; devices of this host: cpu"),
        (absent, "cuda:999"),
        (remote, "another host, which must be known by its key: add --key"),
    ):
        assert worker.wait() == 2
        assert words in "".join(worker.log.splitlines()[-2:])
        assert "Traceback" not in worker.log
    assert left_behind(coordinator) == set()
