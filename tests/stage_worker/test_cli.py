"""The options of a worker: what they mean, and what is refused before anything starts."""

import io
import os
from pathlib import Path

import pytest

from stage_worker.cli import parse_options
from stage_worker.join_token import TOKEN_VARIABLE


def test_defaults() -> None:
    """Only --join is needed; the id says device and process."""
    options = parse_options(["--join", "tcp://localhost:5555"])
    assert options.join == "tcp://127.0.0.1:5555"
    assert (options.device, options.num_threads, options.lifeline_fd) == ("cpu", None, None)
    assert options.worker_id == f"cpu-{os.getpid()}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--join"),
        (["--join", "tcp://192.168.0.4:5"], "another host, which must be known by its key: add --key"),
        (["--join", "nonsense"], "is no endpoint"),
        (["--join", "ipc:///tmp/x", "--threads", "0"], "'0' is not a number from 1"),
        (["--join", "ipc:///tmp/x", "--threads", "two"], "'two' is not a number from 1"),
        (["--join", "ipc:///tmp/x", "--worker-id", "a b"], "'a b' is not made of letters"),
        (["--join", "ipc:///tmp/x", "--join-timeout", "soon"], "'soon' is not a number of seconds"),
        (["--join", "ipc:///tmp/x", "--lifeline-fd", "999"], "--lifeline-fd 999: Bad file descriptor"),
    ],
)
def test_refused_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and a usage line that names the option's value and the remedy."""
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments)
    assert caught.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
OTHER_HOST = ["--join", "tcp://192.0.2.1:7410", "--key", KEY]


def test_a_token_comes_from_where_nobody_else_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A private file, standard input, or the environment, where no child finds it; never the command line."""
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text("abc123\n")
    assert parse_options([*OTHER_HOST, "--token-file", str(file)]).token == "abc123"
    monkeypatch.setattr("sys.stdin", io.StringIO("def456\nmore\n"))
    assert parse_options([*OTHER_HOST, "--token-file", "-"]).token == "def456"
    monkeypatch.setenv(TOKEN_VARIABLE, "789abc")
    assert parse_options(OTHER_HOST).token == "789abc" and TOKEN_VARIABLE not in os.environ
    assert parse_options(OTHER_HOST).token is None
    monkeypatch.setenv(TOKEN_VARIABLE, "789abc")
    assert parse_options(["--join", "ipc:///tmp/x"]).token is None and TOKEN_VARIABLE not in os.environ
    with pytest.raises(SystemExit):
        parse_options([*OTHER_HOST, "--token", "abc123"])
    said = " ".join(capsys.readouterr().err.split())
    assert "everybody on this host (ps)" in said and "--token-file" in said and "abc123" not in said


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("abc123\n", 0o644, "chmod 600"),
        ("", 0o600, "has no token"),
        ("\n", 0o600, "has no token"),
        ("two words", 0o600, "has no token"),
        ("\x1b[2J", 0o600, "has no token"),
        (None, 0o600, "No such file"),
    ],
)
def test_what_is_no_private_token_is_refused(
    text: str | None, mode: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that others may read, an empty one, anything but one line, none at all."""
    file = tmp_path / "token"
    if text is not None:
        file.write_text(text)
        file.chmod(mode)
    with pytest.raises(SystemExit):
        parse_options([*OTHER_HOST, "--token-file", str(file)])
    assert words in " ".join(capsys.readouterr().err.split())
