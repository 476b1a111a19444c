"""Chats and answers on a real terminal under a real shell: what is typed meanwhile, Ctrl-Z and fg, launches that go."""

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest

from tests.commands import start

ROOT = Path(__file__).resolve().parents[2]
GLMPIPE = f"{sys.executable} -m coordinator"
PROMPT = "shell> "
pytestmark = pytest.mark.slow


@contextmanager
def shell(base: Path) -> Iterator[pexpect.spawn]:
    """An interactive shell with job control."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        "XDG_RUNTIME_DIR": str(base),
        "XDG_STATE_HOME": str(base / "state"),
        "TERM": "xterm",
        "PS1": PROMPT,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    child = pexpect.spawn(
        "bash", ["--norc", "--noprofile", "-i"], cwd=str(ROOT), env=environment, encoding="utf-8", timeout=120
    )
    try:
        child.expect_exact(PROMPT)
        yield child
    finally:
        child.close(force=True)


def processes(base: Path, word: bytes) -> list[int]:
    """The living processes of this test with such a word in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if any(word in each for each in words) and f"XDG_RUNTIME_DIR={base}\0".encode() in environment:
            found.append(int(path.name))
    return found


def state(pid: int) -> str:
    """`T` for a stopped process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_what_is_typed_while_an_answer_streams_waits_for_the_prompt(base: Path) -> None:
    """It is not in the middle of the answer, and not lost: it is the next question. Afterwards the terminal echoes."""
    with shell(base) as child:
        child.sendline(f"{sys.executable} -m tests.coordinator.fake_backend")
        child.expect("fake-model")
        child.expect(">")
        child.send("count\r")
        child.expect("n3 ")
        child.send("typed你好\r")
        child.expect("n20 ")
        assert "typed" not in child.before
        child.sendintr()
        child.expect("stopped")
        child.expect("3: typed你好")
        child.send("stop\r")
        child.expect_exact(PROMPT)
        child.sendline("echo $((40 + 2))")
        child.expect_exact("echo $((40 + 2))")
        child.expect("42")


def test_a_chat_is_suspended_in_the_middle_of_an_answer_and_goes_on(base: Path) -> None:
    """Ctrl-Z, the shell echoes, fg, the answer goes on, and what is typed is still not shown in it."""
    with shell(base) as child:
        child.sendline(f"{sys.executable} -m tests.coordinator.fake_backend")
        child.expect("fake-model")
        child.expect(">")
        child.send("count\r")
        child.expect("n3 ")
        child.sendcontrol("z")
        child.expect("Stopped")
        child.expect_exact(PROMPT)
        child.sendline("echo seen $((40 + 2))")
        child.expect_exact("echo seen $((40 + 2))")
        child.expect("seen 42")
        child.sendline("fg")
        child.expect("n9 ")
        child.send("typed\r")
        child.expect("n30 ")
        assert "typed" not in child.before
        child.sendintr()
        child.expect("3: typed")
        child.sendcontrol("z")  # at the prompt
        child.expect("Stopped")
        child.expect_exact(PROMPT)
        child.sendline("fg")
        child.expect(">")
        child.send("hello\r")
        child.expect("5: hello")


def test_workers_are_suspended_with_their_chat(base: Path) -> None:
    """They take no processor and lose nobody meanwhile; fg lets all go on; nothing is left if it is killed instead."""
    with shell(base) as child:
        child.sendline(f"{GLMPIPE} chat --stages 2 --threads 1")
        child.expect("/help lists")
        child.expect(">")
        workers = processes(base, b"stage_worker")
        assert len(workers) == 2
        child.sendcontrol("z")
        child.expect("Stopped")
        child.expect_exact(PROMPT)
        wait_until(lambda: [state(pid) for pid in workers] == ["T", "T"])
        child.sendline("fg")
        child.expect(">")
        child.send("日本的首都是哪里？\r")
        child.expect("东京")
        assert processes(base, b"stage_worker") == workers
        child.expect(">")
        child.sendcontrol("z")
        child.expect("Stopped")
        child.expect_exact(PROMPT)
        child.sendline("kill -9 %1")
        wait_until(lambda: not processes(base, b"stage_worker"))


def test_generate_is_quiet_and_shows_no_escapes(base: Path) -> None:
    """On a terminal; into a pipe goes the text as it is."""
    change = (
        "import glm.decoding as d; plain = d.IncrementalDecoder.push; "
        "d.IncrementalDecoder.push = lambda self, i: plain(self, i) + chr(27) + '[31mred'; "
        "from coordinator.__main__ import main; main()"
    )
    command = f'{sys.executable} -c "{change}" generate --prompt 你好 --greedy --threads 1 2>/dev/null'
    with shell(base) as child:
        child.sendline(command)
        child.expect(r"\ufffd\[31mred.*\r\n")
        child.expect_exact(PROMPT)
        assert "\x1b[31m" not in child.before + child.after
        child.sendline(f"{command} | od -c | grep -c 033")
        child.expect(r"\r([1-9][0-9]*)\r\n")


def test_a_chat_waits_for_a_launch_of_this_moment_and_outlives_it(base: Path) -> None:
    """Asked for before the launch is there; when that ends, the chat keeps what was said, and goes on with the next."""
    with shell(base) as child:
        child.sendline(f"{GLMPIPE} chat --connect")
        child.expect("no running `glmpipe launch` is seen yet; looking for one")
        with start("launch", "--threads", "1") as launch:
            child.expect("/help lists")
            child.send("日本的首都是哪里？\r")
            child.expect("东京")
            child.expect(">")
            launch.send_signal(signal.SIGINT)
            launch.communicate(timeout=60)
        child.send("那法国呢？\r")
        child.expect("conversation is kept")
        child.expect(">")
        child.send(f"/save {base}/kept.txt\r")
        child.expect("wrote 2 messages")
        with start("launch", "--threads", "1") as launch:
            assert launch.stdout is not None and launch.stdout.readline().startswith("serving at")
            child.send("那法国呢？\r")
            child.expect("connected to glmpipe-demo")
            child.expect("巴黎")
            child.send("/exit\r")
            child.expect_exact(PROMPT)
            child.sendline("echo code $?")
            child.expect("code 0")
    assert re.match(r"user:\n日本的首都是哪里？\n\nassistant:\n.*东京", (base / "kept.txt").read_text())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_chat_under_make_is_suspended_with_make(base: Path, tmp_path: Path) -> None:
    """`make chat`, Ctrl-Z: the shell is back; fg: the chat goes on; left, it is no error. Twice."""
    program, stamp = tmp_path / "glmpipe", tmp_path / "installed"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -m tests.coordinator.fake_backend\n")
    program.chmod(0o755)
    stamp.touch()
    with shell(base) as bash:
        bash.sendline(f"make --no-print-directory -o {stamp} STAMP={stamp} BIN={tmp_path} chat")
        bash.expect("fake-model")
        bash.expect(">")
        for question in ("你好", "again"):
            bash.send("\x1a")
            bash.expect("Stopped")
            bash.expect_exact(PROMPT)
            bash.sendline("fg")
            bash.send(f"{question}\r")
            bash.expect(rf"\d: {question}")
            bash.expect(">")
        bash.send("\x04")
        bash.expect_exact(PROMPT)
        bash.sendline('echo "code $?"')
        bash.expect("code 0")
