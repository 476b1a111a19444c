"""A worker removes the directory of a dead launch, and no other."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stage_worker import lifeline
from stage_worker.lifeline import remove_private_dir


@pytest.fixture
def launch_dir(tmp_path: Path) -> Iterator[Path]:
    """A launch's private directory with a socket and a lock file in it."""
    directory = tmp_path / "glmpipe-1-abcd"
    directory.mkdir(mode=0o700)
    (directory / "lock").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(directory)
        listener.bind("control")
        os.chdir(here)
        yield directory


def test_a_dead_launchs_directory_goes(launch_dir: Path) -> None:
    """Sockets, lock and directory."""
    remove_private_dir(f"ipc://{launch_dir}/control")
    assert not launch_dir.exists()
    remove_private_dir(f"ipc://{launch_dir}/control")


def test_a_living_launchs_directory_stays(launch_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody holds the lock, nothing is touched."""
    monkeypatch.setattr(lifeline, "_UNLOCK_WAIT_S", 0.1)
    with (launch_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_private_dir(f"ipc://{launch_dir}/control")
    assert sorted(path.name for path in launch_dir.iterdir()) == ["control", "lock"]


def test_other_directories_stay(launch_dir: Path) -> None:
    """Another name, an open mode, a symbolic link, a loopback endpoint: not a launch's private directory."""
    other = launch_dir.rename(launch_dir.parent / "precious")
    remove_private_dir(f"ipc://{other}/control")
    link = other.parent / "glmpipe-2-link"
    link.symlink_to(other)
    remove_private_dir(f"ipc://{link}/control")
    shared = other.rename(other.parent / "glmpipe-3-open")
    shared.chmod(0o755)
    remove_private_dir(f"ipc://{shared}/control")
    remove_private_dir("tcp://127.0.0.1:5555")
    assert (shared / "control").exists()
    shared.chmod(0o700)
    (shared / "kept").mkdir()
    remove_private_dir(f"ipc://{shared}/control")
    assert [path.name for path in shared.iterdir()] == ["kept"]
