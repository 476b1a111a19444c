"""`glmpipe` commands in processes of their own, as a user starts them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENT = "import coordinator.roster as r; r.SILENCE_LIMIT_S = 60.0"
"""A change to a launch, so that it misses no healthy worker however busy this machine is."""


@contextmanager
def start(
    *arguments: str | Path, stderr: int = subprocess.PIPE, change: str = "pass"
) -> "Iterator[subprocess.Popen[str]]":
    """The command in a process of its own, killed at the end of the block if it still runs.

    `change` is a Python statement that runs there first.
    """
    program = f"import sys; from coordinator.__main__ import main; {change}; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
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


def glmpipe(*arguments: str | Path, change: str = "pass") -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with start(*arguments, change=change) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err
