"""What a worker does about a launcher that died: it leaves, and takes the launcher's private directory with it."""

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path

from protocol.endpoints import ipc_path

_PREFIX = "glmpipe-"
_LOCK = "lock"
_UNLOCK_WAIT_S = 2.0


def remove_private_dir(join_endpoint: str) -> None:
    """Remove the directory of an `ipc://` endpoint if it is a launch's private one and that launch is gone.

    Only a directory called glmpipe-*, owned by this user and closed to others; and not while a living launch holds
    the `lock` in it. Removes files and sockets, never a directory inside.
    """
    socket_path = ipc_path(join_endpoint)
    if socket_path is None:
        return
    directory = Path(socket_path).parent
    if not _is_private(directory) or _stays_locked(directory / _LOCK):
        return
    with contextlib.suppress(OSError):
        for path in directory.iterdir():
            with contextlib.suppress(OSError):
                path.unlink()
        directory.rmdir()


def _is_private(directory: Path) -> bool:
    try:
        info = directory.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and stat.S_IMODE(info.st_mode) & 0o077 == 0
    return is_ours and directory.name.startswith(_PREFIX)


def _stays_locked(lock: Path) -> bool:
    """A dying process closes its files one after the other: give the lock a moment to follow the lifeline."""
    deadline_s = time.monotonic() + _UNLOCK_WAIT_S
    while _is_locked(lock):
        if time.monotonic() > deadline_s:
            return True
        time.sleep(0.02)
    return False


def _is_locked(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
