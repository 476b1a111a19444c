"""The launcher: workers are started, listened to, noticed when they die, and never left behind."""

import errno
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.errors import LaunchError, StageLost
from coordinator.launcher import Launcher
from coordinator.plan import StagePlan
from coordinator.worker_command import usable_cores, worker_command, worker_environment

FAKE = Path(__file__).with_name("fake_worker.py")
ROOT = Path(__file__).resolve().parents[2]
STAGES = (StagePlan("cpu", 0, 3, "fp32", num_threads=1), StagePlan("cuda:0", 3, 6, "fp16"))
ENDPOINT = "ipc:///tmp/glmpipe-test/control"


class Log:
    """Collects the workers' lines and waits for some."""

    def __init__(self) -> None:
        self.lines: queue.Queue[str] = queue.Queue()

    def until(self, text: str, times: int = 1) -> list[str]:
        seen: list[str] = []
        while sum(text in line for line in seen) < times:
            seen.append(self.lines.get(timeout=30))
        return seen


def launcher(behaviour: str, log: Log) -> Launcher:
    command = [sys.executable, str(FAKE), behaviour]
    return Launcher(STAGES, ENDPOINT, on_log=log.lines.put, command=command)


def pids(lines: list[str]) -> list[int]:
    return [int(line.split("hello from ")[1].split()[0]) for line in lines if "hello from" in line]


def is_alive(pid: int) -> bool:
    """Zombies whose new parent has not yet reaped them count as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pid: int) -> None:
    deadline_s = time.monotonic() + 30
    while is_alive(pid):
        assert time.monotonic() < deadline_s, f"process {pid} lives on"
        time.sleep(0.02)


def test_workers_get_their_options_and_their_lines_are_prefixed() -> None:
    """Join endpoint, device, worker id and threads; stdout and stderr both arrive, undecodable bytes too."""
    log = Log()
    with launcher("waits", log) as running:
        lines = log.until("ready", times=2)
        assert running.worker_ids == ("stage-1", "stage-2")
        assert not running.dead()
        running.check()
    text = "\n".join(lines)
    assert "[stage 1 cpu] hello from" in text
    assert f"stage-1 {ENDPOINT} x1" in text
    assert f"stage-2 {ENDPOINT} x{usable_cores()}" in text
    assert "[stage 2 cuda:0] and " in text


def test_stopping_leaves_no_process_and_can_be_repeated() -> None:
    """Polite workers leave on SIGTERM; every one is reaped."""
    log = Log()
    running = launcher("waits", log)
    running.start()
    started = pids(log.until("ready", times=2))
    running.close()
    running.close()
    assert len(started) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_worker_that_ignores_sigterm_is_killed() -> None:
    """The grace has an end."""
    log = Log()
    running = launcher("stubborn", log)
    running.start()
    started = pids(log.until("ready", times=2))
    running.close(grace_s=0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


def test_a_worker_that_dies_before_joining_is_reported_with_its_last_lines() -> None:
    """Stage, device, exit code and what it said."""
    log = Log()
    with launcher("dies", log) as running:
        log.until("hello from", times=1)
        with pytest.raises(LaunchError) as caught:
            while True:
                running.check()
                time.sleep(0.01)
    text = str(caught.value)
    assert "stage 1 (cpu of this host, pid " in text or "stage 2 (cuda:0 of this host, pid " in text
    assert "ended with exit code 3 before it joined; its last lines:" in text
    assert "| hello from" in text


def test_the_worker_that_died_is_named_with_its_signal_and_a_remedy() -> None:
    """SIGKILL mostly means that memory ran out; the other worker is not blamed."""
    log = Log()
    with launcher("is-killed", log) as running:
        while not running.dead():
            time.sleep(0.01)
        [dead] = running.dead()
    assert (dead.stage_index, dead.returncode, dead.reason) == (1, -9, "signal SIGKILL")
    assert "run out of memory" in dead.describe("while serving")


def test_a_command_that_does_not_exist_is_a_launch_error() -> None:
    """Nothing half-started remains."""
    running = Launcher(STAGES, ENDPOINT, command=["/nonexistent/python"])
    with pytest.raises(LaunchError, match=r"/nonexistent/python cannot be started: No such file"):
        running.start()
    assert not running.dead()


def test_a_failing_log_sink_does_not_block_the_workers() -> None:
    """A closed terminal is no reason to stop serving."""

    def broken(line: str) -> None:
        raise BrokenPipeError(line)

    command = [sys.executable, str(FAKE), "dies"]
    with Launcher(STAGES[:1], ENDPOINT, on_log=broken, command=command) as running:
        while not running.dead():
            time.sleep(0.01)
        [dead] = running.dead()
    assert len(dead.last_lines) == 2


HOST = f"""
import sys
from coordinator.launcher import Launcher
from coordinator.plan import StagePlan
stages = [StagePlan("cpu", 0, 1, "fp32"), StagePlan("cpu", 1, 2, "fp32")]
with Launcher(stages, "{ENDPOINT}", on_log=lambda line: print(line, flush=True),
              command=[sys.executable, {str(FAKE)!r}, "waits"]):
    sys.stdin.read()
"""


def test_workers_leave_when_the_launcher_is_killed() -> None:
    """The lifeline reaches end-of-file however the launcher died; no sibling holds it open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOST], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        lines: list[str] = []
        while sum("ready" in line for line in lines) < 2:
            lines.append(host.stdout.readline())
        host.send_signal(signal.SIGKILL)
    started = pids(lines)
    assert len(started) == 2
    for pid in started:
        wait_until_dead(pid)


def test_a_terminals_ctrl_c_reaches_the_launcher_alone() -> None:
    """Each worker leads a process group of its own."""
    log = Log()
    with launcher("waits", log):
        started = pids(log.until("ready", times=2))
        groups = [os.getpgid(pid) for pid in started]
    assert groups == started


def test_the_worker_command_works_from_any_directory(tmp_path: Path) -> None:
    """Neither the current directory nor a file in it called like one of our packages matters."""
    for name in ("torch.py", "protocol.py", "stage_worker.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module was imported')")
    code = "import importlib.util as u; print(u.find_spec('stage_worker').submodule_search_locations[0])"
    command = [*worker_command()[:2], "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=worker_environment({}), capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT / "stage_worker"


def test_a_worker_that_cannot_be_started_just_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptors left: that passes, unlike a command that is not there; the next attempt starts it."""
    with launcher("waits", Log()) as running:
        start = subprocess.Popen

        def none_left(*_: object, **__: object) -> None:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        monkeypatch.setattr(subprocess, "Popen", none_left)
        with pytest.raises(StageLost, match="cannot be started just now: Too many open files"):
            running.restart(1)
        monkeypatch.setattr(subprocess, "Popen", start)
        assert [dead.stage_index for dead in running.dead()] == [1]
        running.restart(1)
        assert running.dead() == []
