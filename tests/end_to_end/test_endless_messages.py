"""A peer with an allowed key sends a message that never ends: it is put out, and a conversation beside it goes on."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import coordinator
from coordinator.chat_model import ChatModel
from coordinator.cluster_settings import Listening
from protocol.connections import IS_SUPPORTED
from protocol.key_files import KeyDirectory
from protocol.security import KeyPair, new_key_pair
from protocol.sockets import control_inflow_bytes, data_inflow_bytes
from tests.end_to_end.test_bombardment import ROOT, bombard, free_ports, resident_bytes
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_SUPPORTED, reason="this system does not count what comes by a connection"),
]
PROMPT = tuple(range(5, 45))
SLACK_BYTES = 2**29
"""What may come until somebody looks, and what the answers take: far from the sixteen gigabytes of the message."""
WORKER = """
import sys, stage_worker.cli, stage_worker.data_plane
from protocol.security import KeyPair
stage_worker.data_plane.new_key_pair = lambda: KeyPair(*sys.argv[1:3])
sys.exit(stage_worker.cli.main(sys.argv[3:]))
"""


class Lab:
    """A launch whose only stage is on another host, called lab2; lab9 may come in, too."""

    def __init__(self, directory: Path) -> None:
        write_checkpoint(directory / "model", {**CAUSAL, "seq_length": 4096})
        self.endpoint = f"tcp://127.0.0.1:{free_ports()}"
        self.keys = KeyDirectory(directory / "keys")
        self.own, self.lab9, self.stage = self.keys.make_own(), new_key_pair(), new_key_pair()
        self.keys.allowed.add("lab2", KeyDirectory(directory / "lab2").make_own().public)
        self.keys.allowed.add("lab9", self.lab9.public)
        plan = directory / "plan.toml"
        plan.write_text('[[stage]]\ndevice = "cpu"\nhost = "lab2"\nlayers = "1-4"\n')
        self.notes: list[str] = []
        self._log = directory / "log"
        words = ["--join", self.endpoint, "--key", self.own.public, "--keys", str(directory / "lab2")]
        with self._log.open("wb") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-c", WORKER, self.stage.public, self.stage.secret, *words, "--threads", "1"],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=log,
            )
        listening = Listening(self.endpoint, self.keys)
        self.chat_model: ChatModel = coordinator.launch(
            directory / "model", plan, listening=listening, on_note=self.notes.append
        )

    @property
    def log(self) -> str:
        """The worker's."""
        return self._log.read_text()

    def answer(self) -> tuple[int, ...]:
        return self.chat_model.generate(PROMPT, seed=11, max_new_tokens=100, ignore_eos=True).token_ids

    def endless(self, plane: str, endpoint: str, server_key: str, keys: KeyPair) -> "subprocess.Popen[str]":
        return bombard("endless_message", plane, endpoint, server_key, keys.public, keys.secret)

    def close(self) -> None:
        self.chat_model.close()
        self.worker.kill()
        self.worker.wait()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


def bear(lab: Lab, attacker: "subprocess.Popen[str]", pid: int, limit_bytes: int) -> None:
    """Answer until the attacker is put out: the same tokens, no recovery, memory within the bound."""
    undisturbed, before, most = lab.answer(), resident_bytes(pid), 0
    try:
        while attacker.poll() is None:
            assert lab.answer() == undisturbed
            most = max(most, resident_bytes(pid) - before)
        assert attacker.returncode == 0
    finally:
        attacker.kill()
        attacker.communicate()
    assert lab.answer() == undisturbed
    assert most < limit_bytes + SLACK_BYTES
    assert lab.chat_model.cluster.epoch == 1 and lab.worker.poll() is None


def test_at_the_control_port(lab: Lab) -> None:
    """By a host that is let in and has nothing to do with the plan; it is named."""
    attacker = lab.endless("control", lab.endpoint, lab.own.public, lab.lab9)
    bear(lab, attacker, os.getpid(), control_inflow_bytes())
    notes = [note for note in lab.notes if "ended a connection" in note]
    assert notes and all("127.0.0.1" in note and "lab9" in note and "control port" in note for note in notes)


def test_at_a_worker(lab: Lab) -> None:
    """With the key of the hop before it."""
    join = lab.chat_model.cluster.join()[0]
    attacker = lab.endless("data", join.data_endpoint, join.public_key, lab.chat_model.cluster.pipeline.keys)
    bear(lab, attacker, lab.worker.pid, data_inflow_bytes(1))
    assert "ended a connection with the previous stage's host, 127.0.0.1" in lab.log


def test_where_the_last_stage_s_steps_arrive(lab: Lab) -> None:
    """With the key of the last stage."""
    pipeline = lab.chat_model.cluster.pipeline
    attacker = lab.endless("data", pipeline.return_endpoint, pipeline.keys.public, lab.stage)
    bear(lab, attacker, os.getpid(), data_inflow_bytes(1))
    assert any("127.0.0.1 to the port of the last stage's steps" in note for note in lab.notes)
