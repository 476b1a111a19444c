"""Paths that cannot even be looked at: below a directory that is closed to this user, or longer than any path."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli import main
from tests.tiny_checkpoints import write_checkpoint
from tests.users import for_everybody, nobody

COMMANDS = [
    "chat --model PATH",
    "chat --plan PATH",
    "chat --connect PATH",
    "chat --connect ipc://PATH",
    "generate --model PATH --prompt x",
    "generate --prompt-file PATH",
    "generate --prompts PATH --out HERE/out",
    "generate --prompts HERE/prompts --out PATH",
    "generate --prompt x --trace PATH",
    "launch PATH",
    "launch --model PATH",
    "convert PATH --precision int4 --out HERE/out",
    "convert HERE/model --precision int4 --out PATH",
    "convert PATH --check",
    "cache --cache-dir PATH",
    "cache prune --all --cache-dir PATH",
    "score --model PATH --text HERE/prompts",
    "score --text PATH",
    "score --text HERE/prompts --tokens PATH",
    "bench --model PATH",
    "bench --trace PATH",
    "dump --model PATH --ids 1 --out HERE/out",
    "dump --ids 1 --out PATH",
    "compare PATH PATH",
]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory for everybody, with a model, a file of prompts, and a directory for nobody, in it."""
    for_everybody(tmp_path)
    (tmp_path / "prompts").write_text('{"prompt": "x"}\n')
    write_checkpoint(tmp_path / "model")
    closed = tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0)
    yield tmp_path
    closed.chmod(0o700)


def said(command: str, path: Path | str, place: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    words = [word.replace("PATH", str(path)).replace("HERE", str(place)) for word in command.split()]
    code = main(words)
    return code, capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_directory_is_told_in_a_line(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path and what is the matter with it, whatever it was named for; no traceback."""
    said(command, place / "absent" / "file", place, capsys)  # what is imported late is so before we are nobody
    with nobody():
        code, told = said(command, place / "closed" / "inner" / "file", place, capsys)
    assert code == (1 if command.startswith("cache") else 2), told
    assert str(place / "closed" / "inner" / "file") in told
    assert "ermission" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("cache", "chat --connect ipc"))])
def test_a_path_longer_than_any_is_told_in_a_line(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As people paste a whole text where a file is due."""
    code, told = said(command, "长" * 2000, place, capsys)
    assert code == 2
    assert "长" * 20 in told
    assert len(told) < 20_000


def test_a_model_directory_that_is_closed_itself(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is there, and nothing in it can be seen."""
    said("chat --model PATH", place / "absent" / "file", place, capsys)
    with nobody():
        code, told = said("chat --model PATH", place / "closed", place, capsys)
    assert (code, "cannot be looked into (Permission denied)" in told) == (2, True)
