"""Workers that die while they start or load, launches that are killed: mended, or ended with nothing left behind."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from coordinator.client import connect
from coordinator.errors import ConnectError, WorkerDied
from coordinator.recovery import LoadPatience, RecoveryPolicy
from coordinator.runtime_dir import find_running
from protocol.client import SamplingParams, TokenPrompt
from tests.commands import glmpipe, start
from tests.end_to_end.faults import DECODE, FOUR, LEAST_WAIT_S, disturbed_launch, processes_of, until
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow

QUESTION = ("--ids", "5,6,7", "--greedy", "--max-new-tokens", "3")


def test_a_worker_killed_while_it_loads_is_started_again(tmp_path: Path) -> None:
    """At the first start the launch goes on; while a stage is brought back, another attempt follows."""
    marker, notes = tmp_path / "marker", list[str]()
    marker.touch()
    with disturbed_launch(tmp_path, "dies-while-loading", "stage-2", str(marker), on_note=notes.append) as launch:
        (lost,) = (note for note in notes if "SIGKILL" in note)
        assert lost.startswith("stage 2 (cpu of this host, pid ") and "while loading" in lost
        assert lost.endswith("starting it again (attempt 1 of 5)")
        launch.must_be_whole()

        def strike() -> None:
            marker.touch()
            launch.hit(signal.SIGKILL, 1)()

        launch.must_survive(DECODE, FOUR, strike)
        assert "while serving" in launch.told[0] and "while loading" in launch.told[1]
        assert "attempt 2 of 5" in launch.told[1] and "all stages serve again" in launch.told[2]


def test_a_worker_that_hangs_in_a_load_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers all pings, but no layer follows the first one: it is named with that layer, and another one loads."""
    marker, notes = tmp_path / "marker", list[str]()
    marker.touch()

    def limit_s(patience: LoadPatience) -> float:
        return 3.0 if patience.num_layers == 1 and not marker.exists() else LEAST_WAIT_S

    monkeypatch.setattr(LoadPatience, "limit_s", property(limit_s))
    with disturbed_launch(tmp_path, "hangs-while-loading", "stage-2", str(marker), on_note=notes.append) as launch:
        lost = next(note for note in notes if "hangs in layer" in note)
        assert (
            lost.startswith("stage 2 (cpu of this host, layers 3-4, pid ") and ") hangs in layer 4: it answers" in lost
        )
        launch.must_be_whole()


def test_a_worker_killed_before_it_joins_is_started_again(tmp_path: Path, base: Path) -> None:
    """From outside, that is; one that ends by itself at that time would do so again."""
    notes: list[str] = []
    killed = threading.Event()

    def strike() -> None:
        while not (pids := {pid for path in base.glob(f"glmpipe-{os.getpid()}-*") for pid in processes_of(path)}):
            time.sleep(0.01)
        os.kill(min(pids), signal.SIGKILL)
        killed.set()

    thread = threading.Thread(target=strike)
    thread.start()
    with disturbed_launch(tmp_path, on_note=notes.append) as launch:
        assert killed.wait(LEAST_WAIT_S)
        assert any("ended with signal SIGKILL before it joined" in note and "attempt 1 of 5" in note for note in notes)
        launch.must_be_whole()
    thread.join()


def test_attempts_to_start_end(tmp_path: Path, base: Path) -> None:
    """A worker that is killed each time: one error with its name and last lines, no process and no file left."""
    marker, notes = tmp_path / "marker", list[str]()
    marker.touch()
    policy = RecoveryPolicy(max_attempts=2, first_delay_s=0.0)
    with (
        pytest.raises(
            WorkerDied, match=r"(?s)stage 2 \(cpu of this host, pid \d+\).*SIGKILL before.*fallen off the bus"
        ),
        disturbed_launch(tmp_path, "dies-once-marked", "stage-2", str(marker), recovery=policy, on_note=notes.append),
    ):
        pass
    assert sum("starting it again" in note for note in notes) == 2
    assert not list(base.glob(f"glmpipe-{os.getpid()}-*"))


# -- launches that are killed


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(path, {**CAUSAL, "seq_length": 65536})
    return path


def launched(process: "subprocess.Popen[str]", base: Path) -> Path:
    """The private directory of a launch that serves."""
    assert process.stdout is not None
    assert process.stdout.readline().startswith("serving at ")
    (directory,) = base.glob(f"glmpipe-{process.pid}-*")
    return directory


def test_a_killed_coordinator_takes_its_workers_along(model_dir: Path, base: Path) -> None:
    """In the middle of an answer: the client gets an error, the workers notice, and everything is gone."""
    command = ("launch", "--model", model_dir, "--stages", "3", "--threads", "1")
    endless = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), 60_000, True, True)
    with start(*command, stderr=subprocess.DEVNULL) as launch:
        directory = launched(launch, base)
        assert len(processes_of(directory)) == 3
        with connect(f"ipc://{directory}/client") as client:
            events = client.stream(TokenPrompt((5, 6, 7)), endless)
            next(events)
            launch.kill()
            with pytest.raises(ConnectError):
                for _ in events:
                    pass
        until(lambda: not processes_of(directory) and not list(base.iterdir()))


def test_a_killed_launch_is_cleared_away_by_the_next(model_dir: Path, base: Path) -> None:
    """Launch and workers die at once, so that nobody tidies up; sockets stay, and the next launch is not disturbed."""
    command = ("launch", "--model", model_dir, "--stages", "2", "--threads", "1")
    with start(*command, stderr=subprocess.DEVNULL) as process:
        directory = launched(process, base)
        process.send_signal(signal.SIGSTOP)  # or it would replace the workers, or they would see it go
        for pid in processes_of(directory):
            os.kill(pid, signal.SIGKILL)
        process.kill()
    assert {"lock", "control", "return", "client"} < {path.name for path in directory.iterdir()}
    assert not [running for running in find_running() if str(base) in running.endpoint]
    with start(*command, stderr=subprocess.DEVNULL) as process:
        own = launched(process, base)
        assert list(base.iterdir()) == [own]
        code, out, err = glmpipe("generate", "--connect", f"ipc://{own}/client", *QUESTION)
        assert code == 0 and len(out.split(",")) == 3, err
        process.terminate()
        process.wait(LEAST_WAIT_S)
    assert list(base.iterdir()) == []
