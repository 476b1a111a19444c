"""A hostile peer at every socket of a running launch: a conversation goes on, token for token."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zmq

import coordinator
from coordinator.chat_model import ChatModel
from coordinator.cluster_settings import Listening
from coordinator.plan_request import PlanRequest
from coordinator.service import serve
from protocol import client
from protocol.key_files import KeyDirectory
from protocol.security import new_key_pair
from protocol.sockets import Socket, client_socket, connect
from protocol.wire import decode, encode
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NUM_ROUNDS = 1500
NUM_NEW = 150
FLAT_BYTES = 96 * 2**20


class Talk:
    """A client with a conversation that is always the same."""

    def __init__(self, context: "zmq.Context[Socket]", endpoint: str, greedy: bool) -> None:
        self._dealer = client_socket(context, zmq.DEALER)
        connect(self._dealer, endpoint)
        self._sampling = client.SamplingParams(1.0, 0, 1.0, 0.0, 1.0, 11, (), NUM_NEW, True, greedy)
        self._request_id = 0

    def tokens(self) -> tuple[int, ...]:
        self._request_id += 1
        prompt = client.TokenPrompt(tuple(range(5, 45)))
        self._dealer.send_multipart(encode(client.Generate(self._request_id, prompt, self._sampling)))
        while True:
            assert self._dealer.poll(60_000), "no answer"
            message, _ = decode(self._dealer.recv_multipart())
            if not isinstance(message, client.Delta | client.Queued):
                assert isinstance(message, client.Finished), message
                return message.token_ids

    def close(self) -> None:
        self._dealer.close(linger=0)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def attacked(chat_model: ChatModel, client_endpoint: str) -> list[str]:
    """Every address of a launch, by plane."""
    cluster = chat_model.cluster
    data = [join.data_endpoint for join in cluster.join()] + [cluster.pipeline.return_endpoint]
    control = cluster.runtime_dir.endpoint("control")
    return [f"client={client_endpoint}", f"control={control}", *(f"data={endpoint}" for endpoint in data)]


def bombard(attacker: str, *words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", f"tests.end_to_end.{attacker}", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_conversations_go_on_under_bombardment(tmp_path: Path) -> None:
    """Garbage, half messages, floods, replays, other versions, wrong planes, thousands of connections, from two sides:
    the same tokens, memory and logs that stay where they were, and nothing left behind."""
    write_checkpoint(tmp_path / "model", {**CAUSAL, "seq_length": 4096})
    lines: list[str] = []
    stop, endpoint = threading.Event(), f"ipc://{tmp_path}/client"
    context: zmq.Context[Socket] = zmq.Context()
    plan = PlanRequest(num_stages=2, num_threads=1)
    with coordinator.launch(tmp_path / "model", plan, on_log=lines.append) as chat_model:
        pids = [os.getpid(), *(join.pid for join in chat_model.cluster.join())]
        directory = chat_model.cluster.runtime_dir.path
        thread = threading.Thread(target=serve, args=(chat_model, endpoint, stop.is_set))
        thread.start()
        talks = [Talk(context, endpoint, greedy) for greedy in (True, False)]
        try:
            undisturbed = [talk.tokens() for talk in talks]
            before = [resident_bytes(pid) for pid in pids]
            targets = attacked(chat_model, endpoint)
            attackers = [bombard("attacker", seed, str(NUM_ROUNDS), *targets) for seed in ("1", "2")]
            num_talks = 0
            while any(attacker.poll() is None for attacker in attackers) or num_talks < 3:
                assert [talk.tokens() for talk in talks] == undisturbed
                num_talks += 1
            reports = [json.loads(attacker.communicate()[0]) for attacker in attackers]
            assert [talk.tokens() for talk in talks] == undisturbed
            after = [resident_bytes(pid) for pid in pids]
        finally:
            for talk in talks:
                talk.close()
            context.term()
            stop.set()
            thread.join(timeout=30)
        assert not thread.is_alive()
    assert [attacker.returncode for attacker in attackers] == [0, 0]
    assert sum(report["sent"] for report in reports) > 4 * NUM_ROUNDS
    assert sum(report["connections"] for report in reports) >= 1500
    assert max(now - then for now, then in zip(after, before, strict=True)) < FLAT_BYTES, (before, after)
    assert len(lines) < 1000
    assert not directory.exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids[1:])


def free_ports() -> int:
    """A port that is free, and the next one."""
    while True:
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError, OverflowError):
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            second.bind(("127.0.0.1", port + 1))
            return port


class Lab:
    """A host called lab2 with a worker of its own, known by its key, and one called lab9 that means harm."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"tcp://127.0.0.1:{free_ports()}"
        self.keys = KeyDirectory(directory / "keys")
        self.own = self.keys.make_own()
        self.friend = new_key_pair()
        self.keys.allowed.add("lab2", KeyDirectory(directory / "lab2").make_own().public)
        self.keys.allowed.add("lab9", self.friend.public)
        self.plan = directory / "plan.toml"
        stages = (("", "1-2"), ('host = "lab2"\n', "3-4"))
        self.plan.write_text("".join(f'[[stage]]\ndevice = "cpu"\n{host}layers = "{n}"\n' for host, n in stages))
        words = ["--join", self.endpoint, "--key", self.own.public, "--keys", str(directory / "lab2")]
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "stage_worker", *words, "--threads", "1"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        )

    def attack(self, seed: str, chat_model: ChatModel) -> "subprocess.Popen[str]":
        data = (chat_model.cluster.join()[1].data_endpoint, chat_model.cluster.pipeline.return_endpoint)
        friend = (self.friend.public, self.friend.secret)
        return bombard("key_attacker", seed, "600", self.endpoint, self.own.public, *friend, *data)

    def close(self) -> None:
        self.worker.kill()
        self.worker.wait()


def test_conversations_go_on_beside_wrong_keys_and_a_false_friend(tmp_path: Path) -> None:
    """Unknown keys, wrong keys, no keys and broken handshakes at every socket that other hosts reach, and one host that
    is let in and says nothing but harm: the same tokens, no recovery, memory that stays where it was."""
    write_checkpoint(tmp_path / "model", {**CAUSAL, "seq_length": 4096})
    lines: list[str] = []
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(contextlib.closing(Lab(tmp_path)))
        listening = Listening(lab.endpoint, lab.keys)
        chat_model = stack.enter_context(
            coordinator.launch(
                tmp_path / "model", lab.plan, listening=listening, on_log=lines.append, on_note=lines.append
            )
        )
        pids = [os.getpid(), *(join.pid for join in chat_model.cluster.join())]
        prompt = tuple(range(5, 45))

        def answers() -> list[tuple[int, ...]]:
            seeds = (None, 11)
            settings = [{"greedy": seed is None, "seed": seed, "max_new_tokens": NUM_NEW} for seed in seeds]
            return [chat_model.generate(prompt, ignore_eos=True, **each).token_ids for each in settings]  # type: ignore[arg-type]

        undisturbed = answers()
        before = [resident_bytes(pid) for pid in pids]
        attackers = [lab.attack(seed, chat_model) for seed in ("1", "2")]
        num_talks = 0
        while any(attacker.poll() is None for attacker in attackers) or num_talks < 3:
            assert answers() == undisturbed
            num_talks += 1
        reports = [json.loads(attacker.communicate()[0]) for attacker in attackers]
        assert answers() == undisturbed
        after = [resident_bytes(pid) for pid in pids]
        assert chat_model.cluster.epoch == 1 and lab.worker.poll() is None
    assert [attacker.returncode for attacker in attackers] == [0, 0]
    assert all(report["sent"] > 2000 and report["connections"] > 1000 for report in reports), reports
    assert max(now - then for now, then in zip(after, before, strict=True)) < FLAT_BYTES, (before, after)
    assert len(lines) < 50, lines[-20:]
