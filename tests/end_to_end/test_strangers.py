"""Somebody without any key opens connections, and more connections, at the ports that other hosts reach."""

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.connections import IS_SUPPORTED
from tests.commands import PATIENT, glmpipe, start
from tests.end_to_end.test_bombardment import Lab
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_SUPPORTED, reason="this system does not tell of its connections"),
]
NUM_HELD = 3000
FEW = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (1024, r.getrlimit(r.RLIMIT_NOFILE)[1]))"
"""What a shell grants at first; NUM_HELD are far more."""
NO_MORE = "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (1024, 1024))"
"""What some containers and services grant in all."""


@contextlib.contextmanager
def strangers(*ports: int) -> Iterator[None]:
    """So many connections to each port that say nothing, made again and again when they are ended."""
    is_over = threading.Event()

    def hold(port: int) -> None:
        held: list[socket.socket] = []
        while not is_over.is_set():
            if len(held) >= NUM_HELD:
                held.pop(0).close()
            stranger = socket.socket()
            stranger.setblocking(False)
            stranger.connect_ex(("127.0.0.1", port))
            held.append(stranger)
            time.sleep(0.0002)
        for stranger in held:
            stranger.close()

    threads = [threading.Thread(target=hold, args=(port,)) for port in ports]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def wait_for(log: Path, words: str) -> None:
    give_up_at_s = time.monotonic() + 120.0
    while words not in log.read_text():
        assert time.monotonic() < give_up_at_s, f"{words!r} did not come:\n{log.read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.mark.parametrize("limit", [FEW, NO_MORE], ids=["at first", "in all"])
def test_strangers_take_no_descriptors_away(tmp_path: Path, base: Path, limit: str) -> None:
    """With 1024 descriptors, at first or in all: local clients are answered, and lost workers started again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 4 * NUM_HELD:
        pytest.skip(f"this system grants {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    assert base.exists()
    model = tmp_path / "model"
    write_checkpoint(model, {**CAUSAL, "seq_length": 4096})
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(contextlib.closing(Lab(tmp_path)))
        words = ("launch", lab.plan, "--model", model, "--listen", lab.endpoint, "--keys", tmp_path / "keys")
        stderr = stack.enter_context(log.open("w"))
        launch = stack.enter_context(start(*words, stderr=stderr.fileno(), change=f"{limit}; {PATIENT}"))
        assert launch.stdout is not None
        endpoint = launch.stdout.readline().split()[-1]
        port = int(lab.endpoint.rpartition(":")[2])

        def ask() -> None:
            ids = ("--ids", "5,6,7", "--greedy", "--max-new-tokens", "5")
            code, _, err = glmpipe("generate", "--connect", endpoint, *ids)
            assert code == 0, err + log.read_text()[-3000:]

        ask()
        with strangers(port, port + 1):
            wait_for(log, "nobody has shaken hands there")
            ask()
            (pid,) = [int(p.name) for p in Path("/proc").iterdir() if _is_worker_of(p, launch.pid)]
            os.kill(pid, signal.SIGKILL)
            wait_for(log, "all stages serve again")
            ask()
        assert launch.poll() is None
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _is_worker_of(process: Path, parent: int) -> bool:
    with contextlib.suppress(OSError):
        words = (process / "cmdline").read_bytes()
        return b"stage_worker" in words and int((process / "stat").read_text().split()[3]) == parent
    return False
