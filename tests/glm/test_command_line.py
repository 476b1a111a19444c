"""Mistyped command lines: one line says what is wrong and what may have been meant, another how to see everything."""

import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.cli import main
from glm.command_line import nearest
from stage_worker.cli import parse_options

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cht", "glmpipe: command 'cht' is unknown (did you mean chat?): it is one of chat, generate, "),
        ("--vesrion", "glmpipe: unknown option --vesrion (did you mean --version?)"),
        ("chat --lyers cpu=1-3", "glmpipe chat: unknown option --lyers (did you mean --layers?)"),
        ("chat --layer=cpu=1-3", "glmpipe chat: unknown option --layer (did you mean --layers?)"),
        ("chat --max_new_tokens 3", "glmpipe chat: unknown option --max_new_tokens (did you mean --max-new-tokens?)"),
        ("chat -model x", "glmpipe chat: unknown option -model (did you mean --model?)"),
        ("chat --prompt x", "glmpipe chat: unknown option --prompt (an option of glmpipe generate)"),
        ("chat hello", "glmpipe chat: nothing can be done here with 'hello'"),
        ("generate 你好", "glmpipe generate: nothing can be done here with '你好': it is neither a directory nor "),
        ("generate --ids 五", "glmpipe generate: --ids: '五' is not a list of token ids; write 5,64286"),
        ("compare a b c", "glmpipe compare: nothing can be done here with 'c'"),
        ("chat --connect --foo", "glmpipe chat: unknown option --foo"),
        ("chat --threads two", "glmpipe chat: --threads 'two' is not a whole number"),
        ("chat --top-p high", "glmpipe chat: --top-p 'high' is not a number"),
        (
            "generate --promt x --jsno",
            "glmpipe generate: unknown options --promt (did you mean --prompt?), --jsno (did",
        ),
        (
            "generate --prompt --json",
            "glmpipe generate: --prompt needs a value (one that begins with a dash: --prompt=V",
        ),
        ("keys alow a b", "glmpipe keys: action 'alow' is unknown (did you mean allow?)"),
        ("keys allow lab2", "glmpipe keys allow: PUBLIC_KEY is missing"),
        ("keys --keys d allow --nme lab2", "glmpipe keys allow: unknown option --nme"),
        ("generate --prompt a --model=", "glmpipe generate: --model is empty; give it a value, or leave it out"),
        ("chat --plan=", "glmpipe chat: --plan is empty; give it a value"),
        ("bench --shape chatglm3", "glmpipe bench: --shape 'chatglm3' is unknown (did you mean chatglm-6b?)"),
    ],
)
def test_a_mistake_is_told_by_the_command_it_was_made_in(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two lines, with exit code 2; mistyped options before those that are missing because of it."""
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    fault, usage = err.splitlines()
    assert fault.startswith(said)
    command = said.partition(":")[0]
    assert usage.startswith(f"usage: {command} [OPTIONS]")
    assert usage.endswith(f"({command} --help says everything)")


def test_a_worker_tells_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Another program, the same words."""
    with pytest.raises(SystemExit):
        parse_options(["--jion", "ipc:///tmp/x"])
    assert capsys.readouterr().err.startswith("glmpipe worker: unknown option --jion (did you mean --join?)\nusage: ")


def test_usage_is_short_and_names_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    """All options follow below it; those that must be given are in it."""
    for words, usage in (
        ("chat", "usage: glmpipe chat [OPTIONS] [MODEL]"),
        ("launch", "usage: glmpipe launch [OPTIONS] [PLAN|MODEL]"),
        ("dump", "usage: glmpipe dump [OPTIONS] --out FILE [MODEL]"),
        ("keys allow", "usage: glmpipe keys allow [OPTIONS] NAME PUBLIC_KEY"),
    ):
        with pytest.raises(SystemExit):
            main([*words.split(), "--help"])
        assert capsys.readouterr().out.splitlines()[0] == usage


def test_values_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    """A negative number is a value, and whoever asks for help gets it, whatever else is wrong."""
    assert main(["chat", "--temperature", "-1"]) == 2
    assert "temperature is -1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["chat", "--lyers", "x", "--help"])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("words", "of"), [("help", "glmpipe"), ("help chat", "glmpipe chat"), ("help worker", "glmpipe worker")]
)
def test_help_is_a_word_too(words: str, of: str, capfd: pytest.CaptureFixture[str]) -> None:
    """As in other programs with commands."""
    done = subprocess.run([sys.executable, "-m", "coordinator", *words.split()], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert capfd.readouterr().out.startswith(f"usage: {of} ")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--temp", "--temperature"),
        ("--STATS", "--stats"),
        ("-t", None),
        ("--qqq", None),
        ("--temprature", "--temperature"),
    ],
)
def test_only_a_name_much_like_it_is_offered(word: str, meant: str | None) -> None:
    """A guess that is far off would be worse than none."""
    assert nearest(word, ["--temperature", "--top-k", "--stats", "--stop"]) == meant
