"""Where what was made once is kept for the next time: quantised layers, compiled kernels."""

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from glm.home import expanded, home

PRIVATE = 0o600
"""What is kept is loaded again unseen, so nobody else may write it; others may lay their files beside it."""
DIRECTORY_VARIABLE = "GLMPIPE_CACHE_DIR"
SWITCH_VARIABLE = "GLMPIPE_CACHE"


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path | None:
    """`$GLMPIPE_CACHE_DIR`, else `glmpipe` in `$XDG_CACHE_HOME` (`~/.cache`); None where it is off, or has no place."""
    if is_switched_off(environment):
        return None
    if chosen := environment.get(DIRECTORY_VARIABLE):
        return expanded(chosen).absolute()
    own = home()
    base = environment.get("XDG_CACHE_HOME") or (own and own / ".cache")
    return Path(base).absolute() / "glmpipe" if base else None


def is_switched_off(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `$GLMPIPE_CACHE` says that nothing is kept."""
    return environment.get(SWITCH_VARIABLE, "on").lower() in ("off", "0", "no", "false")


def make_private(directory: Path) -> None:
    """Make a directory, and those above it, for this user alone; what is there stays as it is. Raises OSError."""
    for place in (*reversed(directory.parents), directory):
        if not place.exists():
            place.mkdir(mode=0o700, exist_ok=True)


def is_own(status: os.stat_result) -> bool:
    """Whether only this user, or root, can have written that file."""
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
