"""A worker that is let in lies in one field of one message at a time, in every field of every message there is."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

import coordinator
from coordinator import cluster, control, loading, roster, whereabouts
from coordinator.chat_model import ChatModel
from coordinator.cluster_settings import Listening
from coordinator.errors import CoordinatorError
from coordinator.recovery import RecoveryPolicy
from coordinator.service import serve
from protocol.client import (
    Cancel,
    ChatPrompt,
    ChatTurn,
    Error,
    Finished,
    Generate,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from protocol.control import Failed, Join, Leaving, Pong, Progress, Ready
from protocol.data import Step, StepFailed
from protocol.errors import ProtocolError
from protocol.key_files import KeyDirectory
from protocol.records import Record
from protocol.sockets import Socket, client_socket, connect
from protocol.wire import decode, encode
from tests.end_to_end.lies import Lie, lies, told
from tests.end_to_end.test_bombardment import free_ports
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90.0
AT_LOADING: tuple[type[Record], ...] = (Join, Ready, Failed)
PROMPT = tuple(range(5, 25))


class Liar:
    """A launch of two stages, one of this host and one of a host whose worker lies."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack, hosts: tuple[str, str]) -> None:
        write_checkpoint(directory / "model", {**CAUSAL, "seq_length": 4096})
        endpoint, keys = f"tcp://127.0.0.1:{free_ports()}", KeyDirectory(directory / "keys")
        own = keys.make_own().public
        keys.allowed.add("lab2", KeyDirectory(directory / "lab2").make_own().public)
        self.lie_path = directory / "lie"
        self.lines: list[str] = []
        plan = directory / "plan.toml"
        stages = zip(hosts, ("1-2", "3-4"), strict=True)
        plan.write_text("".join(f'[[stage]]\ndevice = "cpu"\n{h}layers = "{n}"\n' for h, n in stages))
        words = ["--join", endpoint, "--key", own, "--keys", str(directory / "lab2"), "--threads", "1"]
        log = stack.enter_context((directory / "worker.log").open("w"))
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "tests.end_to_end.lying_worker", str(self.lie_path), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=log,
        )
        stack.callback(self._end_worker)
        self.model: ChatModel = stack.enter_context(
            coordinator.launch(
                directory / "model",
                plan,
                listening=Listening(endpoint, keys, 10.0),
                on_log=self.lines.append,
                on_note=self.lines.append,
                recovery=RecoveryPolicy(max_attempts=100, first_delay_s=0.05, most_delay_s=0.1, settled_s=0.0),
            )
        )
        self.stage_id = f"stage-{hosts.index(LAB2) + 1}"
        self.truth = self.answer()

    def _end_worker(self) -> None:
        self.worker.kill()
        self.worker.wait()

    def answer(self) -> tuple[int, ...]:
        return self.model.generate(PROMPT, greedy=True, max_new_tokens=8, ignore_eos=True).token_ids

    def tell(self, lie: Lie) -> None:
        """Have it told; then every answer is the true one again, though one may have failed meanwhile."""
        lie.write(self.lie_path)
        if lie.kind in {kind.__name__ for kind in AT_LOADING}:
            self.model.cluster._control.roster.give_up(self.stage_id, "is made to load again")
        give_up_at_s = time.monotonic() + DEADLINE_S
        answer: tuple[int, ...] = ()
        while self.lie_path.exists() or answer != self.truth:
            assert time.monotonic() < give_up_at_s, f"{lie} was not got over: {self.lines[-20:]}"
            try:
                self.model.supervisor.check()
                answer = self.answer()
            except CoordinatorError as error:
                answer = ()
                assert "\x1b" not in str(error)
        assert self.worker.poll() is None


LAB2 = 'host = "lab2"\n'


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What takes seconds for the sake of slow networks takes moments here."""
    monkeypatch.setattr(control, "HEARTBEAT_INTERVAL_S", 0.05)
    monkeypatch.setattr(whereabouts, "IDLE_HEARTBEATS", 4)
    monkeypatch.setattr(cluster, "IDLE_HEARTBEATS", 4)
    monkeypatch.setattr(loading, "ANSWER_S", 1.0)
    monkeypatch.setattr("coordinator.first_step.FIRST_STEP_S", 1.0)
    monkeypatch.setattr(roster, "SILENCE_LIMIT_S", 60.0)
    yield


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", [Join, Progress, Ready, Failed, Pong, Leaving, Step, StepFailed])
def test_a_lying_worker_costs_no_more_than_its_stage(kind: type[Record], tmp_path: Path) -> None:
    """The launch stays up, and what it answers is the truth again; no words of the liar act on a terminal."""
    with contextlib.ExitStack() as stack:
        liar = Liar(tmp_path, stack, ("", LAB2))
        for lie in lies(kind):
            liar.tell(lie)
        assert not any("\x1b" in line or "\n[pipeline] all is well" in line for line in liar.lines)


def test_a_lying_client_fails_alone(tmp_path: Path) -> None:
    """Every field of every message of a client, with every kind of prompt: an answer or an error, and the next client
    gets the truth."""
    context: zmq.Context[Socket] = zmq.Context()
    stop, endpoint = threading.Event(), f"ipc://{tmp_path}/client"
    sampling = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, 11, ("stop",), 4, True, False)
    prompts = (ChatPrompt((ChatTurn("user", "", "Hi"),)), TextPrompt("What"), TokenPrompt((5, 6, 7)))
    truths = [Generate(1, prompt, sampling, 2) for prompt in prompts]
    false = [told(each, lie.path, lie.value) for each in truths for lie in lies(Generate) if _fits(each, lie)]
    with coordinator.launch() as chat_model:
        thread = threading.Thread(target=serve, args=(chat_model, endpoint, stop.is_set))
        thread.start()
        dealer = client_socket(context, zmq.DEALER)
        connect(dealer, endpoint)
        try:
            before = [_outcome(dealer, truth, cancels=False) for truth in truths]
            for message in (*false, *(told(Cancel(1), lie.path, lie.value) for lie in lies(Cancel))):
                with contextlib.suppress(ProtocolError):
                    encode(message)
                    _outcome(dealer, message, cancels=True)
            assert [_outcome(dealer, truth, cancels=False) for truth in truths] == before
            assert thread.is_alive()
        finally:
            stop.set()
            thread.join(timeout=30)
            dealer.close(linger=0)
            context.term()


def _fits(message: Generate, lie: Lie) -> bool:
    with contextlib.suppress(KeyError, TypeError, ProtocolError):
        encode(told(message, lie.path, lie.value))
        return True
    return False


def _outcome(dealer: Socket, message: Generate | Cancel, *, cancels: bool) -> object:
    """What became of a request: its token ids, or its error. A cancelled one is not waited for to its end."""
    dealer.send_multipart(encode(message))
    if isinstance(message, Cancel):
        return None
    if cancels:
        dealer.send_multipart(encode(Cancel(message.request_id)))
    while dealer.poll(60_000):
        said, _ = decode(dealer.recv_multipart())
        if isinstance(said, Finished):
            return said.token_ids
        if isinstance(said, Error):
            return said
    raise AssertionError(f"no answer to {message}")
