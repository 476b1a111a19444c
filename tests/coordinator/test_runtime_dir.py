"""The private directory of a launch: closed to others, short enough for sockets, gone afterwards."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.errors import LaunchError
from coordinator.runtime_dir import MAX_PATH_BYTES, RunningLaunch, RuntimeDir, find_running, is_deserted, remove_stale
from protocol.endpoints import checked_endpoint

HOLD = "from coordinator.runtime_dir import RuntimeDir; d = RuntimeDir(); print(d.path, flush=True); input()"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short base directory of its own, as XDG_RUNTIME_DIR."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="g") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        monkeypatch.setattr(tempfile, "tempdir", name)
        yield Path(name)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def found(base: Path) -> list[RunningLaunch]:
    """The launches in `base`; others may run on this machine."""
    return [launch for launch in find_running() if str(base) in launch.endpoint]


def test_only_its_owner_can_enter_it(base: Path) -> None:
    """0700, named after the pid, under XDG_RUNTIME_DIR."""
    with RuntimeDir() as directory:
        assert directory.path.parent == base
        assert directory.path.name.startswith(f"glmpipe-{os.getpid()}-")
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        assert directory.endpoint("control") == f"ipc://{directory.path}/control"


def test_it_is_gone_after_closing_with_all_it_held(base: Path) -> None:
    """Sockets and files go with it; closing twice is harmless."""
    with RuntimeDir() as directory:
        (directory.path / "stage-1").write_text("x")
    directory.close()
    assert list(base.iterdir()) == []


def test_an_interrupted_close_can_be_repeated(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while it is being removed leaves the rest to the next close, at the latest at exit."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    directory = RuntimeDir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coordinator.runtime_dir.shutil.rmtree", interrupt)
        directory.close()
    directory.close()
    assert list(base.iterdir()) == []


def test_it_is_gone_when_the_process_just_ends(base: Path) -> None:
    """Without a `close`, the end of the interpreter removes it."""
    code = HOLD.replace("input()", "raise SystemExit(3)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stdout.startswith(str(base))
    assert list(base.iterdir()) == []


def test_what_a_killed_launch_left_is_removed_by_the_next(base: Path) -> None:
    """SIGKILL leaves the directory; the next start clears it, and only it."""
    (base / "glmpipe-notes").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        remove_stale(base)
        assert left.is_dir(), "a living launch's directory must not be touched"
        process.send_signal(signal.SIGKILL)
    assert left.is_dir()
    with RuntimeDir():
        assert not left.exists()
    assert [path.name for path in base.iterdir()] == ["glmpipe-notes"]


def test_a_directory_that_others_can_enter_is_neither_trusted_nor_touched(base: Path) -> None:
    """In a shared base, our name proves nothing."""
    path = base / f"glmpipe-{dead_pid()}-abcdefgh"
    path.mkdir(mode=0o755)
    remove_stale(base)
    assert path.is_dir()


def test_a_base_that_is_too_long_for_socket_paths_is_passed_over(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next shorter one is used, and without any the error says what to set."""
    long_base = base / ("x" * 80)
    long_base.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long_base))
    with RuntimeDir() as directory:
        assert directory.path.parent == base
        assert len(directory.endpoint("x" * 32).removeprefix("ipc://")) <= MAX_PATH_BYTES
    monkeypatch.setattr("coordinator.runtime_dir._bases", lambda: (long_base, base / "absent"))
    with pytest.raises(LaunchError, match=r"the limit is 100; .*absent: No such.*; set TMPDIR"):
        RuntimeDir()


@pytest.mark.parametrize("name", [b"\xff\xfe", b"new\nline", b"bell\x07"])
def test_a_base_that_no_endpoint_can_name_is_passed_over(
    name: bytes, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is used, by launches and by those who look for them."""
    odd = os.path.join(os.fsencode(base), name)  # noqa: PTH118 - bytes
    os.mkdir(odd, 0o700)  # noqa: PTH102
    monkeypatch.setenv("XDG_RUNTIME_DIR", os.fsdecode(odd))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(base))
    with RuntimeDir() as directory, socket.socket(socket.AF_UNIX) as served:
        assert directory.path.parent == base
        assert checked_endpoint(directory.endpoint("control"))
        served.bind(directory.endpoint("client").removeprefix("ipc://"))
        assert [launch.endpoint for launch in find_running()] == [directory.endpoint("client")]
    os.rmdir(odd)  # noqa: PTH106


def test_running_launches_are_found_by_their_client_socket(base: Path) -> None:
    """A launch without clients' socket, or a dead one's leftover socket, is not a running launch."""
    leftover = base / f"glmpipe-{dead_pid()}-abcdefgh"
    leftover.mkdir(mode=0o700)
    with RuntimeDir() as directory, socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        leftover.mkdir(mode=0o700, exist_ok=True)
        two.bind(str(leftover / "client"))
        assert found(base) == []
        one.bind(str(directory.path / "client"))
        assert found(base) == [RunningLaunch(os.getpid(), directory.endpoint("client"))]
    assert found(base) == []


def test_a_socket_that_a_killed_launch_left_is_deserted(base: Path) -> None:
    """Its lock is free; one of a launch that lives is not; a socket elsewhere, without a lock, may be anybody's."""
    with RuntimeDir() as running:
        socket = running.path / "client"
        assert is_deserted(socket)
        socket.touch()
        assert not is_deserted(socket)
    left = base / "glmpipe-1-x"
    left.mkdir()
    for name in ("lock", "client"):
        (left / name).touch()
    assert is_deserted(left / "client")
    (left / "lock").unlink()
    assert not is_deserted(left / "client")
