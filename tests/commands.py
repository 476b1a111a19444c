"""`glmpipe` commands in processes of their own, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def start(*arguments: str | Path, stderr: int = subprocess.PIPE) -> "Iterator[subprocess.Popen[str]]":
    """The command in a process of its own, killed at the end of the block if it still runs."""
    with subprocess.Popen(
        [sys.executable, "-m", "coordinator.cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def glmpipe(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with start(*arguments) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err
