"""Files that a user names and that are read whole: bounded, whatever is named."""

from pathlib import Path

import pytest

from coordinator.cli import main
from coordinator.commands import doctor
from coordinator.errors import UsageError
from coordinator.input_files import read_input

COMMANDS = [
    "generate --prompt-file PATH",
    "chat --system @PATH",
    "score --text PATH",
    "launch PATH",
    "chat --plan PATH",
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["sparse", "endless"])
def test_no_file_is_too_large_for_a_line(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten sparse gigabytes, or a device without an end: the most that is read is said, and no more is."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10 << 30)
    assert main(command.replace("PATH", str(path) if kind == "sparse" else "/dev/zero").split()) == 2
    told = capsys.readouterr().err
    assert "MiB, the most that is read of such a file" in told
    assert ("large" if kind == "sparse" else "/dev/zero") in told


def test_a_file_of_the_most_bytes_is_read(tmp_path: Path) -> None:
    """One more is refused."""
    (tmp_path / "file").write_bytes(b"x" * 1024)
    assert read_input(tmp_path / "file", "--prompt-file", 1024) == b"x" * 1024
    with pytest.raises(UsageError, match=r"--prompt-file .*file is larger than"):
        read_input(tmp_path / "file", "--prompt-file", 1023)


def test_doctor_tells_of_a_torch_that_reads_no_bin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that nobody learns it from a model of many gigabytes."""
    monkeypatch.setattr(doctor, "_worker_facts", lambda: "")
    monkeypatch.setattr(doctor, "version", lambda _: "2.5.1")
    assert main(["doctor"]) == 0
    assert "note: no .bin weights are read, a .bin file can run code as torch 2.5.1 reads it" in capsys.readouterr().out
