"""Files of results: what is recognised as done, what is refused, and what a kill leaves."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.batch_prompts import BatchLine
from coordinator.batch_results import ResultFile, answer, failure, logprobs_as_json
from coordinator.errors import ResultFileError, ResultsError
from coordinator.model_identity import ModelIdentity
from glm.logprobs import TokenLogprob
from protocol.client import Finished, TokenPrompt
from tests.coordinator.fake_backend import STATS

LINE = BatchLine(3, None, TokenPrompt((5,)), {}, 4, None, "digest")
NAMED = replace(LINE, number=4, id="名")
FINISHED = Finished(1, "stop", "你好", (1, 2), STATS)


def write(path: Path, *results: dict[str, Any]) -> None:
    with ResultFile(path) as file:
        for result in results:
            file.add(result)


def test_what_is_written_is_recognised(tmp_path: Path) -> None:
    """Answers by index; a failure is still missing; Chinese is written as it is; a line is what the README says."""
    path = tmp_path / "out"
    write(path, answer(LINE, 1, FINISHED), failure(LINE, 0, "no"), answer(NAMED, 3, FINISHED))
    with ResultFile(path) as file:
        assert file.missing(LINE) == (0, 2, 3)
        assert file.missing(NAMED) == (0, 1, 2)
        assert file.missing(replace(NAMED, num_answers=1)) == (0,)
        assert file.missing(replace(LINE, number=5)) == (0, 1, 2, 3)
    lines = path.read_bytes().decode().splitlines()
    assert '"text": "你好"' in lines[0]
    assert json.loads(lines[0]) == {
        "id": None,
        "line": 3,
        "index": 1,
        "text": "你好",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "prompt_tokens": 50,
        "new_tokens": 21,
        "prompt_digest": "digest",
    }
    assert json.loads(lines[1]) == {"id": None, "line": 3, "index": 0, "error": "no", "prompt_digest": "digest"}


def test_logprobs_are_json_even_where_there_was_no_chance() -> None:
    """Minus infinity is null."""
    found = logprobs_as_json([TokenLogprob(5, -0.5, ((5, -0.5), (6, -math.inf))), TokenLogprob(7, -math.inf)])
    assert found == [
        {"token_id": 5, "logprob": -0.5, "top": [[5, -0.5], [6, None]]},
        {"token_id": 7, "logprob": None, "top": []},
    ]
    assert answer(LINE, 0, FINISHED, [TokenLogprob(7, -math.inf)])["logprobs"] == found[1:]


@pytest.mark.parametrize("kept", [1, 4, 8, 20, -2])
def test_a_torn_last_line_is_cut(kept: int, tmp_path: Path) -> None:
    """Wherever the kill came; what was whole stays, and a new line starts where the torn one did."""
    path = tmp_path / "out"
    write(path, answer(LINE, 0, FINISHED))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept])
    with ResultFile(path) as file:
        assert file.num_cut_bytes == len(whole[:kept])
        file.add(answer(LINE, 1, FINISHED))
    assert path.read_bytes().startswith(whole)
    assert path.read_bytes().count(b"\n") == 2
    with ResultFile(path) as file:
        assert (file.num_cut_bytes, file.missing(LINE)) == (0, (2, 3))


def test_a_torn_line_longer_than_a_piece_is_cut(tmp_path: Path) -> None:
    """The end of the whole lines is looked for backwards, piece by piece."""
    path = tmp_path / "out"
    write(path, answer(LINE, 0, FINISHED))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": ' + b"x" * 300_000)
    ResultFile(path).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"prompt": "a"}\n', "line 1: not a line that this command writes"),
        (b"5\n", "line 1: not a line"),
        (b'{"id": [], "line": 1, "index": 0, "prompt_digest": "x"}\n', "line 1: not a line"),
        (b'{"id": null, "line": 1, "index": -1, "prompt_digest": "x"}\n', "line 1: not a line"),
        (b"my notes", "its last line is none that this command writes"),
    ],
)
def test_other_files_are_refused_and_left_alone(data: bytes, said: str, tmp_path: Path) -> None:
    """Nothing of somebody's file is cut or overwritten."""
    path = tmp_path / "out"
    path.write_bytes(data)
    with pytest.raises(ResultFileError, match=said):
        ResultFile(path)
    assert path.read_bytes() == data


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    """A prompt that has changed, one that is not there any more, and two with one id."""
    path = tmp_path / "out"
    write(path, answer(LINE, 0, FINISHED), answer(NAMED, 0, FINISHED))
    with ResultFile(path) as file:
        with pytest.raises(ResultFileError, match=r"out, line 1: the answer is not to line 3 of these prompts"):
            file.missing(replace(LINE, digest="another"))
        with pytest.raises(ResultFileError, match="line 2: it answers the prompt with id '名', which is not among"):
            file.refuse_strangers()
        file.missing(NAMED)
        file.refuse_strangers()
        file.add(answer(replace(NAMED, digest="another"), 1, FINISHED))
    with pytest.raises(ResultFileError, match="lines 2 and 3: answers to two prompts with the same id"):
        ResultFile(path)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A second one is told so; when the first has ended it may."""
    path = tmp_path / "out"
    with ResultFile(path) as file:
        with pytest.raises(ResultFileError, match="another run is writing it"):
            ResultFile(path)
        file.add(answer(LINE, 0, FINISHED))
    ResultFile(path).close()


def test_a_run_that_wrote_nothing_leaves_no_file(tmp_path: Path) -> None:
    """Unless the file was there before."""
    new, old = tmp_path / "new", tmp_path / "old"
    old.touch()
    for path in (new, old):
        ResultFile(path).close()
    assert (new.exists(), old.exists()) == (False, True)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """A directory, a device, a directory that is missing: refused. A full disk: told, with what to do."""
    for path, said in ((tmp_path, "is a directory"), (Path("/dev/null"), "a device"), (tmp_path / "a/b", "No such")):
        with pytest.raises(ResultFileError, match=said):
            ResultFile(path)
    with ResultFile(tmp_path / "out") as file:
        file._file.close()
        file._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115, PTH123
        with pytest.raises(ResultsError, match=r"No space left.*make room, then the same command goes on"):
            file.add(answer(LINE, 0, FINISHED))


def test_an_answer_that_broke_off_unasked_has_a_note(tmp_path: Path) -> None:
    """By the context, or by the model's files; not where the line says how many tokens are wanted."""
    full = answer(LINE, 0, replace_reason("context_full"))
    assert full["note"].startswith("the answer breaks off here, as the context is full: 50 tokens of prompt and 21")
    assert "generation_config.json" in answer(LINE, 0, replace_reason("length"))["note"]
    asked = replace(LINE, sampling={"max_new_tokens": 21})
    assert "note" not in answer(asked, 0, replace_reason("length"))
    path = tmp_path / "out"
    write(path, full)
    with ResultFile(path) as file:
        assert file.missing(LINE) == (1, 2, 3)


def replace_reason(reason: Any) -> Finished:
    return Finished(1, reason, "你好", (1, 2), STATS)


MODEL = ModelIdentity("a", "f1", "fp32", "chatglm2")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (replace(MODEL, name="renamed"), None),
        (
            replace(MODEL, fingerprint="f2"),
            "line 2: the answer is that of a, and now another .*files f2 instead of f1",
        ),
        (replace(MODEL, precision="int8"), "precision int8 instead of fp32"),
        (replace(MODEL, chat_format="chatglm3"), "chat format chatglm3 instead of chatglm2"),
    ],
)
def test_which_model_answered_is_compared(model: ModelIdentity, said: str | None, tmp_path: Path) -> None:
    """By its files, precision and chat format; a failure is nobody's answer."""
    failed = failure(LINE, 0, "no") | {"model": replace(MODEL, precision="int4").as_json()}
    write(tmp_path / "out", failed, answer(LINE, 1, FINISHED) | {"model": MODEL.as_json()})
    with ResultFile(tmp_path / "out") as file:
        if said is None:
            file.refuse_other_models(model)
        else:
            with pytest.raises(ResultFileError, match=said):
                file.refuse_other_models(model)


def test_an_answer_of_nobody_knows_whom_is_not_gone_on_from(tmp_path: Path) -> None:
    """Files had no word of the model before; what is no model is no line of ours."""
    write(tmp_path / "out", answer(LINE, 0, FINISHED))
    with (
        ResultFile(tmp_path / "out") as file,
        pytest.raises(ResultFileError, match="line 1: it does not say which mod"),
    ):
        file.refuse_other_models(MODEL)
    for model in ({"name": "a"}, "a", {**MODEL.as_json(), "precision": []}):
        write(tmp_path / "other", answer(LINE, 0, FINISHED) | {"model": model})
        with pytest.raises(ResultFileError, match="line 1: not a line that this command writes"):
            ResultFile(tmp_path / "other")
        (tmp_path / "other").unlink()
