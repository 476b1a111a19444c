"""Closed streams, and streams on a full disk: a line and an exit code, from every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_tokenizers import write_talking_model

ROOT = Path(__file__).resolve().parents[2]
TAKES_NOTHING = {">&-": "Bad file descriptor", ">/dev/full": "No space left on device"}
QUICK = [["--help"], ["--version"], ["cache"], ["doctor"], ["worker", "--help"], ["compare", "{a}", "{a}"]]
SLOW = [
    ["generate", "--ids", "5,6", "--max-new-tokens", "4", "--ignore-eos"],
    ["generate", "--ids", "5,6", "--max-new-tokens", "4", "--ignore-eos", "--n", "2", "--json"],
    ["chat"],
    ["score", "--text", "{text}"],
    ["bench", "--shape", "tiny", "--prompt-tokens", "4", "--new-tokens", "4", "--json"],
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers of random weights with a tokenizer."""
    return write_talking_model(tmp_path_factory.mktemp("models") / "tiny")


def run(words: list[str], redirection: str, model_dir: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """`glmpipe` with streams as a shell makes them."""
    text = model_dir / "text.txt"
    text.write_text("Hello there, who are you? " * 4)
    named = {"{a}": str(next(model_dir.glob("*.safetensors"))), "{text}": str(text)}
    words = [named.get(word, word) for word in words]
    if words[0] in ("generate", "chat", "score"):
        words += ["--model", str(model_dir), "--threads", "1"]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-P", "-m", "coordinator", *words]
    return subprocess.run(
        shell,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings},
        input="hello\n",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def assert_told(words: list[str], redirection: str, model_dir: Path) -> None:
    done = run(words, redirection, model_dir)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (1, False, False), done.stderr
    assert f": stdout cannot be written: {TAKES_NOTHING[redirection]}" in last


@pytest.mark.parametrize("redirection", TAKES_NOTHING)
@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_a_stdout_that_takes_nothing_is_one_line(words: list[str], redirection: str, model_dir: Path) -> None:
    """Exit code 1: what was asked for did not arrive."""
    assert_told(words, redirection, model_dir)


@pytest.mark.slow
@pytest.mark.parametrize("redirection", TAKES_NOTHING)
@pytest.mark.parametrize("words", SLOW, ids=" ".join)
def test_an_answer_that_nobody_can_have_is_one_line(
    words: list[str], redirection: str, model_dir: Path, base: Path
) -> None:
    """In the middle of an answer, too; nothing is left of the launch."""
    assert_told(words, redirection, model_dir)
    assert list(base.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&-", "<&- 2>&-"])
def test_an_answer_arrives_whatever_the_other_streams_are(redirection: str, model_dir: Path, base: Path) -> None:
    """What cannot be said on stderr is lost, and nothing else; no socket takes the number of a closed stream."""
    done = run([*SLOW[0], "--json"], redirection, model_dir)
    assert (done.returncode, len(json.loads(done.stdout)["ids"])) == (0, 4), done.stderr
    assert "Traceback" not in done.stderr
    assert list(base.iterdir()) == []


@pytest.mark.slow
def test_a_chat_without_input_ends_at_once(model_dir: Path, base: Path) -> None:
    """A closed stdin is at its end."""
    done = run(["chat"], "<&-", model_dir)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
    assert list(base.iterdir()) == []


@pytest.mark.parametrize("words", [["cache"], ["doctor"]], ids=" ".join)
def test_nothing_at_all_is_open(words: list[str], model_dir: Path) -> None:
    """Exit code 1, as it could say nothing."""
    done = run(words, "<&- >&- 2>&-", model_dir)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
