"""The coordinator's sockets in the hands of a test, and real worker processes around them."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import zmq

from protocol.control import Assign, Failed, Join, Ping, Pong, Progress, Ready, Release, Released, Welcome
from protocol.data import KvUpdate, Span, Step, StepFailed
from protocol.messages import Message, Plane
from protocol.sockets import Socket, bind, connect, control_socket, data_socket, receive, send
from protocol.tensors import RawTensor
from protocol.torch_bridge import from_raw, to_raw
from protocol.wire import decode, encode

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_MS = 60_000


class FakeWorker:
    """A worker process as the coordinator sees it: its Join, requests and replies, its log."""

    def __init__(self, coordinator: "FakeCoordinator", process: "subprocess.Popen[str]", log: Path) -> None:
        self.coordinator = coordinator
        self.process = process
        self.log_path = log
        self.identity = b""
        self.join: Join
        self.progress: list[Progress] = []

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def cpu_ticks(self) -> int:
        """Processor time the process has used, in clock ticks."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def post(self, message: Message) -> None:
        self.coordinator.router.send_multipart([self.identity, *encode(message)])

    def next_message(self) -> tuple[Message, tuple[RawTensor, ...]]:
        """What the worker says next; Progress is collected, not returned."""
        while True:
            message, tensors = self.coordinator.hear(self.identity)
            if not isinstance(message, Progress):
                return message, tensors
            self.progress.append(message)

    def request(self, message: Any) -> Any:
        """The reply to a request, whose request_id it must repeat."""
        self.post(message)
        reply, _ = self.next_message()
        assert reply.request_id == message.request_id, reply  # type: ignore[union-attr]
        return reply

    def ping(self) -> Pong:
        reply = self.request(Ping(request_id=next(self.coordinator.ids)))
        assert isinstance(reply, Pong)
        return reply

    def assign(self, model_dir: Path, start: int, end: int, **changes: Any) -> Ready | Failed:
        """Assign layers [start, end) in fp32, results to the coordinator unless `changes` say otherwise."""
        reply = self.request(self.assignment(model_dir, start, end, **changes))
        assert isinstance(reply, Ready | Failed)
        return reply

    def assignment(self, model_dir: Path, start: int, end: int, **changes: Any) -> Assign:
        fields: dict[str, Any] = {
            "request_id": next(self.coordinator.ids),
            "epoch": 1,
            "stage_index": 0,
            "num_stages": 1,
            "model_path": str(model_dir),
            "model_revision": None,
            "fingerprint": "",
            "layer_start": start,
            "layer_end": end,
            "precision": "fp32",
            "kv_budget_tokens": 100,
            "next_endpoint": self.coordinator.data_endpoint,
            "next_public_key": None,
            "previous_public_key": None,
            "activation_dtype": None,
            "record_hidden_states": False,
        }
        return Assign(**{**fields, **changes})

    def release(self) -> Released:
        reply = self.request(Release(next(self.coordinator.ids), 1))
        assert isinstance(reply, Released)
        return reply

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(DEADLINE_MS / 1000)


class FakeCoordinator:
    """Speaks the protocol by hand to workers that it starts.

    Binds a ROUTER and a PULL in `directory`, or both at `endpoint`, which then is tcp://127.0.0.1:*.
    """

    def __init__(self, directory: Path, endpoint: str | None = None) -> None:
        self.directory = directory
        self.context: zmq.Context[Socket] = zmq.Context()
        self.router = control_socket(self.context, zmq.ROUTER)
        self.pull = data_socket(self.context, zmq.PULL)
        self.push: dict[str, Socket] = {}
        self.control_endpoint = bind(self.router, endpoint or f"ipc://{directory}/control")
        self.data_endpoint = bind(self.pull, endpoint or f"ipc://{directory}/data")
        self.workers: list[FakeWorker] = []
        self.ids = iter(range(1, 10_000))
        self._waiting: dict[bytes, list[tuple[Message, tuple[RawTensor, ...]]]] = {}

    def spawn(self, *options: str, pass_fds: tuple[int, ...] = ()) -> FakeWorker:
        """Start a worker process; `admit` waits for it."""
        log = self.directory / f"log-{len(self.workers)}"
        command = [sys.executable, "-m", "stage_worker", "--join", self.control_endpoint, "--threads", "1", *options]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=pass_fds,
                text=True,
            )
        worker = FakeWorker(self, process, log)
        self.workers.append(worker)
        return worker

    def admit(self, *workers: FakeWorker, answer: Any = None, orphan_timeout_s: float = 600.0) -> None:
        """Wait for the Joins of these workers and welcome them (or send `answer` instead)."""
        by_pid = {worker.process.pid: worker for worker in workers}
        while by_pid:
            identity, message, _ = self._receive()
            if not isinstance(message, Join) or message.pid not in by_pid:
                continue
            worker = by_pid.pop(message.pid)
            worker.identity, worker.join = identity, message
            worker.post(answer or Welcome(message.request_id, "test", 1.0, orphan_timeout_s, False))

    def hear(self, identity: bytes) -> tuple[Message, tuple[RawTensor, ...]]:
        """The next message of one worker; those of others wait for their turn."""
        while not self._waiting.get(identity):
            sender, message, tensors = self._receive()
            self._waiting.setdefault(sender, []).append((message, tensors))
        return self._waiting[identity].pop(0)

    def send_step(self, worker: FakeWorker, hidden: torch.Tensor, *parts: KvUpdate | Span, **changes: Any) -> Step:
        """Push a step at a worker's data port."""
        spans = tuple(part for part in parts if isinstance(part, Span))
        updates = tuple(part for part in parts if not isinstance(part, Span))
        fields = {"epoch": 1, "step_id": next(self.ids), "updates": updates, "spans": spans, "timings": ()}
        step = Step(**{**fields, **changes})
        send(self.push_to(worker), step, (to_raw(hidden),))
        return step

    def push_to(self, worker: FakeWorker) -> Socket:
        endpoint = worker.join.data_endpoint
        if endpoint not in self.push:
            self.push[endpoint] = data_socket(self.context, zmq.PUSH)
            connect(self.push[endpoint], endpoint)
            assert self.push[endpoint].poll(DEADLINE_MS, zmq.POLLOUT)
        return self.push[endpoint]

    def collect(self) -> tuple[Step | StepFailed, torch.Tensor | None]:
        """The next message from the last stage."""
        assert self.pull.poll(DEADLINE_MS), self._logs()
        message, tensors = decode(receive(self.pull), Plane.DATA)
        assert isinstance(message, Step | StepFailed)
        return message, from_raw(tensors[0]) if tensors else None

    def close(self) -> None:
        """End every worker, whatever it does, and close every socket."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        for socket in (self.router, self.pull, *self.push.values()):
            socket.close(linger=0)
        self.context.term()

    def _receive(self) -> tuple[bytes, Message, tuple[RawTensor, ...]]:
        assert self.router.poll(DEADLINE_MS), self._logs()
        identity, *frames = receive(self.router)
        return bytes(identity), *decode(frames, Plane.CONTROL)

    def _logs(self) -> str:
        return "\n".join(worker.log for worker in self.workers)


@contextmanager
def fake_coordinator(endpoint: str | None = None) -> Iterator[FakeCoordinator]:
    """A coordinator in a private directory of its own, which need not be there any more at the end."""
    with tempfile.TemporaryDirectory(prefix="glmpipe-", ignore_cleanup_errors=True) as directory:
        coordinator = FakeCoordinator(Path(directory), endpoint)
        try:
            yield coordinator
        finally:
            coordinator.close()
            Path(directory).mkdir(exist_ok=True)


def wait_until(condition: Any) -> None:
    """Poll until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
