"""A worker of another host, here over loopback with keys: it waits, proves itself, and outlives its coordinator."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from glm.demo import demo_model_dir
from glm.model_source import open_checkpoint
from protocol.control import Assign, Join, Ready, Refused, Welcome
from protocol.key_files import KeyDirectory
from protocol.messages import Message
from protocol.security import Gatekeeper, new_key_pair, sender_key
from protocol.sockets import Socket, bind, control_socket, data_socket
from protocol.wire import decode, encode

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_MS = 60_000
pytestmark = pytest.mark.slow
KEYS = new_key_pair()


class Coordinator:
    """A guarded ROUTER that says what the test tells it to."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[Socket] = zmq.Context()
        self.gatekeeper = Gatekeeper(self.context)
        self.allowed: set[str] = set()
        self.router = control_socket(self.context, zmq.ROUTER)
        self.gatekeeper.guard(self.router, KEYS, "control", self.allowed.__contains__)
        self.endpoint = bind(self.router, "tcp://127.0.0.1:*")
        self.back = data_socket(self.context, zmq.PULL)
        self.back_endpoint = bind(self.back, f"ipc://{directory}/back")
        self.identity = b""
        self.key = ""

    def hear(self, wanted: type[Message]) -> Message:
        """The worker's next message of that type."""
        while True:
            assert self.router.poll(DEADLINE_MS), f"no {wanted.__name__} came"
            identity, *frames = self.router.recv_multipart(copy=False)
            message, _ = decode([frame.buffer for frame in frames])
            if isinstance(message, wanted):
                self.identity, self.key = identity.bytes, sender_key(frames[0])
                return message

    def say(self, message: Message) -> None:
        self.router.send_multipart([self.identity, *encode(message)])

    def close(self) -> None:
        self.gatekeeper.close()
        self.context.destroy(linger=0)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path)
    yield coordinator
    coordinator.close()


class RunningWorker:
    def __init__(self, directory: Path, *words: str) -> None:
        self._log = directory / "log"
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stage_worker", "--keys", str(directory / "keys"), *words],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, words: str) -> None:
        give_up_at_s = time.monotonic() + DEADLINE_MS / 1000
        while words not in self.log:
            assert self.process.poll() is None and time.monotonic() < give_up_at_s, self.log
            time.sleep(0.05)


@pytest.fixture
def own(tmp_path: Path) -> str:
    return KeyDirectory(tmp_path / "keys").make_own().public


@pytest.fixture
def worker(coordinator: Coordinator, own: str, tmp_path: Path) -> Iterator[RunningWorker]:
    assert own
    worker = RunningWorker(tmp_path, "--join", coordinator.endpoint, "--key", KEYS.public, "--threads", "1")
    yield worker
    worker.process.kill()
    worker.process.wait()


def assignment(coordinator: Coordinator, request_id: int) -> Assign:
    fingerprint = open_checkpoint(demo_model_dir()).fingerprint()
    end = coordinator.back_endpoint
    return Assign(request_id, 1, 0, 1, "", None, fingerprint, 0, 2, "fp32", 100, end, None, "nobody", None, False)


def test_it_waits_until_its_key_is_allowed_and_outlives_its_coordinator(coordinator, worker, own) -> None:  # type: ignore[no-untyped-def]
    """An unknown key is told what to do and comes again; silence frees what was assigned, but not the weights."""
    worker.wait_for(f"glmpipe keys allow NAME_OF_THIS_HOST '{own}'")
    coordinator.allowed.add(own)
    join = coordinator.hear(Join)
    assert isinstance(join, Join)
    assert coordinator.key == own and join.public_key != own and join.is_guarded
    coordinator.say(Welcome(join.request_id, "first", 1.0, 600.0, False))
    coordinator.say(assignment(coordinator, 5))
    first = coordinator.hear(Ready)
    assert isinstance(first, Ready) and first.request_id == 5

    coordinator.say(Welcome(join.request_id, "first", 1.0, 1.0, False))
    again = coordinator.hear(Join)  # nothing was said to it for a second
    assert isinstance(again, Join)
    assert again.public_key == join.public_key
    coordinator.say(Welcome(again.request_id, "second", 1.0, 600.0, False))
    coordinator.say(assignment(coordinator, 6))
    second = coordinator.hear(Ready)
    assert isinstance(second, Ready) and second.weight_bytes == first.weight_bytes
    assert "these layers were still here" in worker.log
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.wait(DEADLINE_MS / 1000) == 128 + signal.SIGTERM


def test_it_asks_again_where_no_stage_is_free_and_leaves_where_it_is_not_wanted(coordinator, worker, own) -> None:  # type: ignore[no-untyped-def]
    """No seat: later perhaps. Another refusal: exit code 4 with the coordinator's words."""
    coordinator.allowed.add(own)
    coordinator.hear(Join)
    coordinator.say(Refused(1, "no_seat", "no stage waits for cpu of lab2"))
    coordinator.hear(Join)
    coordinator.say(Refused(1, "version", "install the same version on both"))
    assert worker.process.wait(DEADLINE_MS / 1000) == 4
    assert "install the same version on both" in worker.log


def test_without_a_coordinator_it_waits_and_can_be_ended(tmp_path: Path) -> None:
    """Whoever is at the address hangs up: it comes again and again, and leaves at once when asked."""
    KeyDirectory(tmp_path / "keys").make_own()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        nobody.settimeout(DEADLINE_MS / 1000)
        address = "tcp://{}:{}".format(*nobody.getsockname())
        worker = RunningWorker(tmp_path, "--join", address, "--key", KEYS.public, "--device", "cpu")
        try:
            for _ in range(3):
                nobody.accept()[0].close()
            assert worker.process.poll() is None
            worker.process.send_signal(signal.SIGTERM)
            assert worker.process.wait(DEADLINE_MS / 1000) == 128 + signal.SIGTERM
        finally:
            worker.process.kill()
            worker.process.wait()


@pytest.mark.parametrize("words", [("--token-file", "token"), ()], ids=["a token makes one", "no token"])
def test_a_worker_without_a_key(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token its host gets a key; without one it is told how to make it."""
    monkeypatch.chdir(tmp_path)
    Path("token").touch(0o600)
    Path("token").write_text("x")
    base = ("--join", "tcp://127.0.0.1:9", "--key", KEYS.public, "--join-timeout", "0.5")
    worker = RunningWorker(tmp_path, *base, *words)
    assert worker.process.wait(DEADLINE_MS / 1000) == (3 if words else 2)
    assert KeyDirectory(tmp_path / "keys").own_path.exists() == bool(words)
    assert ("made a key" if words else "glmpipe keys new") in worker.log


def test_a_wrong_key_of_the_coordinator_is_said_rarely(coordinator, own, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Tried again every second or two; the log is for people."""
    assert own
    words = ("--join", coordinator.endpoint, "--key", new_key_pair().public, "--join-timeout", "9", "--threads", "1")
    worker = RunningWorker(tmp_path, *words)
    assert worker.process.wait(DEADLINE_MS / 1000) == 3
    assert 1 <= worker.log.count("has another key than --key, or is no coordinator") <= 2, worker.log
