"""`glmpipe generate` with files, several answers and log-probabilities: what is refused, and what needs no model."""

import json
from pathlib import Path

import pytest

from coordinator.batch_prompts import BatchDefaults, read_prompts
from coordinator.batch_results import ResultFile, answer
from coordinator.cli import main
from coordinator.report import logprob_lines
from glm.logprobs import TokenLogprob
from protocol.client import Finished
from tests.coordinator.fake_backend import STATS
from tests.tiny_checkpoints import CAUSAL
from tests.tiny_tokenizers import train_chatglm2


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model without weights, so that loading would fail, and files of prompts."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CAUSAL))
    Path("good").write_text('{"token_ids": [5]}\n{"token_ids": [6], "id": "x"}\n')
    Path("bad").write_text('{"token_ids": [5]}\n{"promt": "a"}\n{"prompt": "a", "top_p": 7}\n')
    Path("large").write_text('{"token_ids": [5]}\n{"token_ids": [96, 7]}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--prompts good", "--prompts needs --out"),
        ("--prompts good --out answers --json", "--json is about a single answer"),
        ("--prompts good --out answers --stats", "--stats is about a single answer"),
        ("--prompts absent --out answers", "--prompts absent: there is no such file"),
        ("--prompts /dev/stdin --out answers", "--prompts /dev/stdin is not a file; it is read twice"),
        ("--prompts good --out good", "--out good is the file of prompts itself"),
        ("--prompts good --out model", "--out model is a directory"),
        ("--prompts good --out large", "large, line 1: not a line that this command writes"),
        ("--prompts bad --out answers", "bad has 3 faults:\n  - line 2: unknown key 'promt'"),
        ("--prompts large --out answers", "large, line 2: token id 96 is outside the vocabulary"),
        ("--prompts good --out answers --temperature=-1", "temperature is -1.0"),
        ("--prompts good --out answers --connect --stages 2", "drop --stages"),
        ("--prompt a --out answers", "--out is where the answers to --prompts go"),
        ("--prompt a --n 0", "--n 0 must be from 1 to"),
        ("--prompt a --n 3 --greedy", "--n 3 answers would be the same one"),
        ("--prompt a --logprobs 21", "--logprobs 21 must be from 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_loading(
    arguments: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, nothing on stdout, no file of answers."""
    model = [] if "--connect" in arguments else ["--model", str(here / "model")]
    assert main(["generate", *arguments.split(), *model]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("glmpipe: ")
    assert said in err
    assert not Path("answers").exists()


def test_a_conversation_of_a_form_that_the_model_lacks_is_refused_before_loading(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ChatGLM2 knows no system message: the first line with one is named, although others have none."""
    train_chatglm2(here / "model")
    (here / "model" / "config.json").write_text(json.dumps({**CAUSAL, "padded_vocab_size": 1024}))
    user, system = ({"role": role, "content": "Be brief."} for role in ("user", "system"))
    lines = [[user], [user], [system, user], [system, user]]
    Path("talks").write_text("".join(json.dumps({"messages": line}) + "\n" for line in lines))
    assert main(["generate", "--prompts", "talks", "--out", "answers", "--model", str(here / "model")]) == 2
    assert "glmpipe: talks, line 3: " in capsys.readouterr().err
    assert not Path("answers").exists()


def test_nothing_is_loaded_when_nothing_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run after the last one is over at once, even where the model is not there any more."""
    with ResultFile(Path("answers")) as results:
        for line in read_prompts(Path("good"), BatchDefaults()):
            results.add(answer(line, 0, Finished(1, "stop", "a", (1,), STATS)))
    assert main(["generate", "--prompts", "good", "--out", "answers", "--model", str(here / "absent")]) == 0
    assert capsys.readouterr().err == "2 answers in answers already: nothing is left to do\n"
    Path("blank").write_text("\n\n")
    assert main(["generate", "--prompts", "blank", "--out", "none"]) == 0
    assert capsys.readouterr().err == "blank asks for nothing: it has no line with a prompt\n"


def test_log_probabilities_for_reading() -> None:
    """A line for each token, with what it stands for and the likeliest ones if those were asked for."""
    logprobs = [TokenLogprob(5, -0.25, ((7, -0.125), (5, -0.25))), TokenLogprob(6, -3)]
    assert list(logprob_lines(logprobs, lambda token_id: f"'{token_id}'")) == [
        "   -0.250       5 '5'           likeliest: 7 '7' -0.125, 5 '5' -0.250",
        "   -3.000       6 '6'",
    ]
