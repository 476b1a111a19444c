"""Being another user for a while, where that can be: closed directories are not closed to root."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def nobody() -> Iterator[None]:
    """As a user for whom a closed directory is closed, which it is not for root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def for_everybody(tmp_path: Path) -> None:
    """Let that user read a test's directory, and what is in it."""
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.parents[:2], *tmp_path.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
