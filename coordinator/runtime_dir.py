"""The private directory of a launch: where its sockets live, gone when the launch is.

    <base>/glmpipe-<pid>-XXXXXXXX/    0700, so that only its owner reaches the sockets inside
        lock                          held (flock) for as long as the launch lives
        control, return, client, ...  ipc sockets

A directory is stale when its lock is free and its pid is gone: the lock covers launches in another container
that shares the base, the pid covers the moment before the lock is taken.
"""

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.closing import Closing
from coordinator.errors import LaunchError
from coordinator.signals import signals_deferred
from glm.signals import undone_at_signals

CLIENT_SOCKET = "client"
"""The name of the socket on which a running launch serves `--connect` programs."""

MAX_PATH_BYTES = 100
"""A Unix socket's path must fit into 108 bytes; some of them stay free for the transport."""

MAX_SOCKET_NAME_BYTES = 32
"""Room kept for the socket's own name inside the directory."""

_NAME = re.compile(r"glmpipe-([0-9]+)-[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True)
class RunningLaunch:
    """A launch that answers clients, if only that it still loads; `since_s` is when it began, by the clock."""

    pid: int
    endpoint: str
    since_s: float = field(default=0.0, compare=False)


class RuntimeDir(Closing):
    """A fresh private directory for the sockets of one launch. A context manager; `close` removes it.

    Raises LaunchError when no base directory is writable and short enough for a Unix socket's path.
    """

    def __init__(self) -> None:
        for base in _bases():
            remove_stale(base)
        self._entered = ExitStack()
        with signals_deferred():
            self.path = _make(f"glmpipe-{os.getpid()}-")
            self._owner = os.getpid()
            self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._is_open = True
            self._entered.enter_context(undone_at_signals(self.close))
            atexit.register(self.close)

    def endpoint(self, name: str) -> str:
        """The ipc endpoint called `name` in this directory."""
        if len(os.fsencode(name)) > MAX_SOCKET_NAME_BYTES or "/" in name:
            raise ValueError(f"{name!r} does not suit as a socket's name")
        return f"ipc://{self.path / name}"

    def remove_sockets(self, pattern: str, keep: Collection[str]) -> None:
        """Remove the sockets of this pattern whose endpoints are not among those to keep: what the killed leave."""
        for path in self.path.glob(pattern):
            if f"ipc://{path}" not in keep and path.is_socket():
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the directory and everything in it. Safe to call twice, and does nothing in a forked child."""
        if not self._is_open or os.getpid() != self._owner:
            return
        shutil.rmtree(self.path, ignore_errors=True)  # first: interrupted, it is done again at exit
        self._is_open = False
        self._entered.close()
        atexit.unregister(self.close)
        os.close(self._lock)


def find_running(*, everywhere: bool = False) -> tuple[RunningLaunch, ...]:
    """The launches of this user that answer clients, newest first: those in the best place that has any, or all."""
    found: list[RunningLaunch] = []
    for base in _bases():
        here = []
        for path, pid in _launch_dirs(base):
            socket = path / CLIENT_SOCKET
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(socket.lstat().st_mode) and _is_locked(path):
                    here.append(RunningLaunch(pid, f"ipc://{socket}", (path / "lock").stat().st_ctime))
        found += sorted(here, key=lambda launch: launch.since_s, reverse=True)
        if found and not everywhere:
            break
    return tuple(found)


def is_deserted(socket: Path) -> bool:
    """Whether the launch that made a socket is gone, though the socket may be there: as after a kill."""
    return not socket.exists() or ((socket.parent / "lock").exists() and not _is_locked(socket.parent))


def remove_stale(base: Path) -> None:
    """Remove what launches of this user left in `base` when they were killed."""
    for path, pid in _launch_dirs(base):
        if not _pid_exists(pid) and not _is_locked(path):
            shutil.rmtree(path, ignore_errors=True)


def _bases() -> tuple[Path, ...]:
    """Where launches may live, best first: what an endpoint can name, which is printable text."""
    names = [os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"]
    paths = [Path(name) for name in names if name and name.isprintable() and Path(name).is_absolute()]
    return tuple(dict.fromkeys(paths))


def _make(prefix: str) -> Path:
    reasons = []
    for base in _bases():
        longest = base / f"{prefix}{'X' * 8}" / ("X" * MAX_SOCKET_NAME_BYTES)
        num_bytes = len(os.fsencode(longest))
        if num_bytes > MAX_PATH_BYTES:
            reasons.append(f"{base} makes socket paths of {num_bytes} bytes, the limit is {MAX_PATH_BYTES}")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
    raise LaunchError(f"no directory for the sockets ({'; '.join(reasons)}); set TMPDIR to a short, writable directory")


def _launch_dirs(base: Path) -> Iterator[tuple[Path, int]]:
    """Directories in `base` that this user's launches made, with the pid in their name."""
    with contextlib.suppress(OSError):
        for path in base.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and _is_ours(path):
                yield path, int(match[1])


def _is_ours(path: Path) -> bool:
    """Another user may put a directory of our name into a shared base: never trust or touch that."""
    try:
        info = path.lstat()
    except OSError:
        return False
    private = stat.S_IMODE(info.st_mode) & 0o077 == 0
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and private


def _is_locked(path: Path) -> bool:
    """Whether a living launch holds the lock in `path`."""
    try:
        lock = os.open(path / "lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(lock)


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
