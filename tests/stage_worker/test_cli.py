"""The options of a worker: what they mean, and what is refused before anything starts."""

import os

import pytest

from stage_worker.cli import parse_options


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
