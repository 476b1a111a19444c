"""Ctrl-C and SIGTERM at random moments of every command."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.interrupts import ROOT, Place, command_lines, interrupted, moments, plain
from tests.tiny_tokenizers import write_talking_model

pytestmark = pytest.mark.slow
MANY = int(os.environ.get("GLMPIPE_INTERRUPTS", "2"))
"""Moments for each command and signal. `GLMPIPE_INTERRUPTS=100` takes hours."""
LONGEST_LIFE_S = 8.0
WAIT_FOR_PEOPLE = ("chat", "launch", "worker")
COMMANDS = ("chat", "generate", "launch", "keys", "convert", "cache", "score", "bench", "dump", "compare", "doctor")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of random weights with a tokenizer."""
    return write_talking_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def place(base: Path) -> Place:
    """Short enough for a socket's path."""
    return Place(base / "p")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", [*COMMANDS, "worker"])
def test_a_signal_at_any_moment(name: str, number: signal.Signals, model_dir: Path, place: Place) -> None:
    """One line at most, exit code 128 + the signal, no process, no socket, no temporary or unfinished file."""
    extra = {key: place.root / key for key in ("text", "a", "b")}
    extra["text"].write_text("Hello, who are you? " * 40)
    shutil.copyfile(next(model_dir.glob("*.safetensors")), extra["a"])
    shutil.copyfile(extra["a"], extra["b"])
    words = command_lines(model_dir, place, extra)[name]
    usual: set[str] = set()
    life_s = _life_s(words, place, usual, ends_by_itself=name not in WAIT_FOR_PEOPLE)
    faults = []
    for moment_s in moments(name, life_s, MANY, number):
        shutil.rmtree(place.root / "out")
        (place.root / "out").mkdir()
        ended = interrupted(words, place, number, moment_s)
        faults += [f"{moment_s:.3f} s of {life_s:.1f}: {fault}" for fault in ended.faults(number, frozenset(usual))]
    assert faults == []


def _life_s(words: list[str], place: Place, usual: set[str], *, ends_by_itself: bool) -> float:
    """How long it runs when it is let, what it says then; a command that waits for people is ended."""
    began_s = time.monotonic()
    ended = interrupted(words, place, None if ends_by_itself else signal.SIGINT, LONGEST_LIFE_S)
    usual |= {plain(line) for line in (place.root / "log").read_text().splitlines()}
    assert ended.returncode in (0, 130), (place.root / "log").read_text()
    return time.monotonic() - began_s


def test_python_itself_is_started_with_signals_blocked(place: Place) -> None:
    """Of the command as it is installed: no traceback while Python starts; 130, or what shells call so."""
    if subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True, check=False).returncode:
        pytest.skip("env cannot block signals here")
    script = place.root / "glmpipe"
    shutil.copy(ROOT / "bin" / "glmpipe", script)
    python = place.root / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert interrupted(["--version"], place, None, 0.0, program=(str(script),)).returncode == 0
    faults = []
    for moment_s in moments("script", 0.3, 5 * MANY):
        ended = interrupted(["cache"], place, signal.SIGINT, moment_s, settled=False, program=(str(script),))
        faults += [fault for fault in ended.faults(signal.SIGINT, frozenset()) if fault != "exit code -2"]
    assert faults == []
