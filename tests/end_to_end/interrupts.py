"""Commands that are sent a signal at a random moment of their lives, and what is left of them then."""

import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glm.convert import UNFINISHED
from glm.converted import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
UGLY = re.compile(
    r"Traceback|terminate called|Fatal|Exception ignored|Aborted|core dumped|KeyboardInterrupt|SystemExit"
)
MARK = "GLMPIPE_TEST_MARK"
DEADLINE_S = 90.0
ENDING_S = 0.1
"""A process that has done all and is being taken apart by the system takes no signal any more."""


@dataclass(frozen=True)
class Place:
    """Directories of a command's own, where it could leave something."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("run", "tmp", "home", "out"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def environment(self, mark: str) -> dict[str, str]:
        """With every directory that a command might write to inside."""
        own = {"XDG_RUNTIME_DIR": "run", "TMPDIR": "tmp", "HOME": "home", "XDG_CONFIG_HOME": "home"}
        paths = {name: str(self.root / where) for name, where in own.items()}
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark, **paths}

    def left(self) -> list[str]:
        """Sockets, temporary files and what a broken-off command began; not the cache and whole results."""
        found = [path for name in ("run", "tmp") for path in (self.root / name).rglob("*")]
        found += [path for path in self.root.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".new-")]
        return sorted({str(path.relative_to(self.root)) for path in found} | self._unfinished())

    def _unfinished(self) -> set[str]:
        return {f"out/{path.name}" for path in (self.root / "out").iterdir() if path.is_dir() and not _is_whole(path)}


def _is_whole(converted: Path) -> bool:
    return (converted / MANIFEST).is_file() and not (converted / UNFINISHED).exists()


@dataclass(frozen=True)
class Ended:
    """How a command ended, `after_s` after it was sent a signal; None: it had ended before."""

    returncode: int
    after_s: float | None
    said_after: tuple[str, ...]
    left: tuple[str, ...]

    def faults(self, number: signal.Signals, usual: frozenset[str]) -> list[str]:
        """What should not have been. `usual` are lines that the command also prints when nobody interrupts it."""
        new = [line for line in self.said_after if plain(line) not in usual]
        faults = [f"{len(new)} lines: {new}"] if len(new) > 1 else []
        faults += [f"said {line}" for line in self.said_after if UGLY.search(line)]
        faults += [f"left {name}" for name in self.left]
        was_ending = self.returncode == 0 and self.after_s is not None and self.after_s < ENDING_S
        if self.after_s is not None and self.returncode != 128 + number and not was_ending:
            faults.append(f"exit code {self.returncode}")
        return faults


def plain(line: str) -> str:
    """A line without what differs from run to run."""
    return re.sub(r"[0-9]+(\.[0-9]+)?", "0", line.strip())


def interrupted(
    words: list[str],
    place: Place,
    number: signal.Signals | None,
    moment_s: float,
    *,
    settled: bool = True,
    program: tuple[str, ...] = (sys.executable, "-P", "-m", "coordinator"),
) -> Ended:
    """Run `glmpipe` with these words, and send it a signal, if any, `moment_s` after it begins.

    It begins, if `settled`, with its first statement, else with the process: what comes between is Python's own start.
    """
    mark = uuid.uuid4().hex
    log = place.root / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*program, *words],
            env=place.environment(mark),
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=place.root / "home",
        )
        try:
            return _followed(process, log, place, mark, number, moment_s, settled)
        finally:
            process.kill()
            process.communicate()
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)


def _followed(
    process: "subprocess.Popen[bytes]",
    log: Path,
    place: Place,
    mark: str,
    number: signal.Signals | None,
    moment_s: float,
    settled: bool,
) -> Ended:
    while settled and process.poll() is None and not _handles(process.pid, signal.SIGTERM):
        time.sleep(0.001)
    until_s = time.monotonic() + moment_s
    while process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.002)
    said_bytes, sent_s = 0, None
    if number is not None and process.poll() is None:
        said_bytes, sent_s = log.stat().st_size, time.monotonic()
        process.send_signal(number)
    process.wait(DEADLINE_S)
    after_s = None if sent_s is None else time.monotonic() - sent_s
    said = log.read_bytes()[said_bytes:].decode("utf-8", "replace").splitlines()
    until_s = time.monotonic() + 10  # what notices by itself that its parent has gone takes a moment
    while (still := marked(mark)) and time.monotonic() < until_s:
        time.sleep(0.02)
    left = [*place.left(), *(f"process {pid} {_words(pid)}" for pid in still)]
    return Ended(process.returncode, after_s, tuple(said), tuple(left))


def marked(mark: str) -> list[int]:
    """The living processes that have this mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def _words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return "that has gone"


def _handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal, which Python itself has for SIGINT alone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def command_lines(model: Path, place: Place, extra: Mapping[str, Path]) -> dict[str, list[str]]:
    """Every command, as short as it can be asked to do something. `extra` are a text and two dumps."""
    out = place.root / "out"
    two = ["--model", str(model), "--layers", "cpu=1-2", "--layers", "cpu=3-4", "--threads", "1"]
    ids = ["--ids", "5,6,7"]
    return {
        "chat": ["chat", *two],
        "generate": [
            "generate",
            *two,
            *ids,
            "--max-new-tokens",
            "200",
            "--ignore-eos",
            "--cpu-precision",
            "int8",
            "--json",
        ],
        "launch": ["launch", *two],
        "keys": ["keys", "new", "--replace"],
        "convert": ["convert", str(model), "--precision", "int4", "--out", str(out / "converted"), "--threads", "1"],
        "cache": ["cache", "prune", "--all"],
        "score": ["score", *two, "--text", str(extra["text"])],
        "bench": ["bench", "--shape", "tiny", "--threads", "1", "--prompt-tokens", "16", "--new-tokens", "16"],
        "dump": ["dump", *two, *ids, "--out", str(out / "dump.safetensors")],
        "compare": ["compare", str(extra["a"]), str(extra["b"])],
        "doctor": ["doctor"],
        "worker": ["worker", "--join", f"ipc://{place.root}/nobody", "--join-timeout", "30"],
    }


def moments(name: str, life_s: float, many: int, seed: int = 0) -> list[float]:
    """Random ones of a life, the same ones every time."""
    chosen = random.Random(f"{name} {seed}")
    return [chosen.uniform(0.0, life_s) for _ in range(many)]
