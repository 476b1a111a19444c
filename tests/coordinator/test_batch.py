"""From a file of prompts to a file of answers: everything once, however often it is interrupted."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.batch import Request, answers_to, missing_jobs, run_batch, survey
from coordinator.batch_prompts import BatchDefaults
from coordinator.batch_results import ResultFile
from coordinator.batch_view import Totals
from coordinator.errors import PromptFileError, ResultFileError, StageLost
from protocol.client import ChatPrompt, ChatTurn
from tests.coordinator.fake_backend import DEFAULTS
from tests.coordinator.fake_batch import FakeBatch

PLAIN = BatchDefaults()


class Watcher:
    """Counts how often it was told to look."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.num_updates = 0

    def update(self) -> None:
        self.num_updates += 1


def write_prompts(tmp_path: Path, lines: list[dict[str, Any]]) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def run(
    prompts: Path, out: Path, backend: FakeBatch, defaults: BatchDefaults = PLAIN, most_open: int = 4
) -> tuple[Totals, Watcher]:
    """One run, as the command does it."""
    watcher = Watcher()
    with ResultFile(out) as results:
        survey(prompts, defaults, results)
        run_batch(backend, missing_jobs(prompts, defaults, results), results, watcher, most_open=most_open)
    return watcher.totals, watcher


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_is_answered_once_in_any_order(tmp_path: Path) -> None:
    """At most so many at once; n answers have indexes and seeds that count up; a line's sampling goes through."""
    lines: list[dict[str, Any]] = [{"prompt": f"问 {number}"} for number in range(30)]
    lines.append({"prompt": "several", "n": 3, "seed": 10, "id": "s", "logprobs": 0, "temperature": 0.25})
    backend = FakeBatch()
    totals, watcher = run(write_prompts(tmp_path, lines), tmp_path / "out", backend)
    found = results(tmp_path / "out")
    assert (totals.num_done, totals.num_failed, totals.num_tokens) == (33, 0, 33)
    assert watcher.num_updates >= 33
    assert backend.most_open == 4
    assert [each["line"] for each in found] != sorted(each["line"] for each in found)
    assert {(each["line"], each["text"]) for each in found if each["id"] is None} == {
        (number + 1, f"问 {number} None") for number in range(30)
    }
    several = {each["index"]: each for each in found if each["id"] == "s"}
    assert {index: each["text"] for index, each in several.items()} == {i: f"several {10 + i}" for i in range(3)}
    assert several[0]["logprobs"] == [{"token_id": 7, "logprob": -0.5, "top": []}]
    assert "logprobs" not in found[0] or found[0]["id"] == "s"
    assert backend.requests[-1].sampling.temperature == 0.25


class Interruption(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("seed", range(5))
def test_interrupted_runs_add_up_to_one_that_was_not(seed: int, tmp_path: Path) -> None:
    """Ended at random places, within a line too, and started again until all is there: nothing twice, nothing
    missing, and the seeds of single answers as in one go."""
    chance = random.Random(seed)
    lines = [{"prompt": f"p{number}", "n": 1 + number % 3, "seed": 100 * number} for number in range(20)]
    prompts, out = write_prompts(tmp_path, lines), tmp_path / "out"

    def interrupt() -> None:
        if chance.random() < 0.1:
            raise Interruption

    num_runs = 0
    while True:
        num_runs += 1
        backend = FakeBatch(interrupt)
        try:
            run(prompts, out, backend)
            break
        except Interruption:
            assert backend.was_dropped
        if out.exists() and chance.random() < 0.5:
            out.write_bytes(out.read_bytes()[: -chance.randrange(1, 30)])
    assert num_runs > 1
    found = sorted((each["line"], each["index"], each["text"]) for each in results(out))
    wanted = [(n + 1, i, f"p{n} {100 * n + i}") for n in range(20) for i in range(1 + n % 3)]
    assert found == wanted


def test_what_failed_by_itself_is_told_and_tried_again(tmp_path: Path) -> None:
    """The others are not touched by it; the next run asks for the failed ones only."""
    lines = [{"prompt": text} for text in ("fine", "refused", "broken", "cancelled")]
    prompts, out = write_prompts(tmp_path, lines), tmp_path / "out"
    totals, _ = run(prompts, out, FakeBatch())
    assert (totals.num_done, totals.num_failed) == (4, 3)
    errors = {each["line"]: each["error"] for each in results(out) if "error" in each}
    assert errors == {2: "it does not fit", 3: "stage 2 could not do the step", 4: "cancelled"}
    again = FakeBatch()
    run(prompts, out, again)
    asked = [request.prompt.turns[0].content for request in again.requests]  # type: ignore[union-attr]
    assert sorted(asked) == ["broken", "cancelled"]


def test_a_lost_backend_ends_it_with_whole_lines(tmp_path: Path) -> None:
    """What was answered stays, nothing is written about the rest, and the error comes through."""
    num_polls = 0

    def lose() -> None:
        nonlocal num_polls
        num_polls += 1
        if num_polls == 4:
            raise StageLost("stage 2 died")

    prompts, out = write_prompts(tmp_path, [{"prompt": "a"}] * 9), tmp_path / "out"
    with pytest.raises(StageLost):
        run(prompts, out, FakeBatch(lose))
    assert len(results(out)) == 3
    assert not any("error" in each for each in results(out))


def test_prompts_are_read_as_they_are_needed(tmp_path: Path) -> None:
    """Not all of them at once: when the first answers come, the file has been read a little further than these."""
    lines = [{"prompt": f"p{number}"} for number in range(100)]
    prompts = write_prompts(tmp_path, lines)
    pulled: list[int] = []
    with ResultFile(tmp_path / "out") as file:

        def jobs() -> Any:
            for job in missing_jobs(prompts, PLAIN, file):
                pulled.append(job.line.number)
                yield job

        watcher = Watcher()
        ahead = []
        backend = FakeBatch(lambda: ahead.append(len(pulled) - watcher.totals.num_done))
        run_batch(backend, jobs(), file, watcher, most_open=6)
    assert len(pulled) == 100
    assert max(ahead) <= 7


def test_more_answers_than_may_be_open_go_alone(tmp_path: Path) -> None:
    """A prompt with many answers is neither refused nor waits for ever."""
    prompts = write_prompts(tmp_path, [{"prompt": "a"}, {"prompt": "b", "n": 9}, {"prompt": "c"}])
    totals, _ = run(prompts, tmp_path / "out", FakeBatch(), most_open=4)
    assert totals.num_done == 11


def surveyed(prompts: Path, out: Path, defaults: BatchDefaults = PLAIN) -> Any:
    with ResultFile(out) as file:
        return survey(prompts, defaults, file)


def test_a_survey_counts_before_anything_is_loaded(tmp_path: Path) -> None:
    """Answers, those missing, and the largest id, which the model must have."""
    prompts = write_prompts(tmp_path, [{"prompt": "a", "n": 2}, {"token_ids": [5, 900]}, {"token_ids": [7]}])
    found = surveyed(prompts, tmp_path / "out")
    assert (found.num_answers, found.num_missing, found.largest_id) == (4, 4, (2, 900))
    out = tmp_path / "out"
    run(write_prompts(tmp_path, [{"prompt": "a", "n": 2}]), out, FakeBatch())
    write_prompts(tmp_path, [{"prompt": "a", "n": 3}, {"prompt": "b"}])
    found = surveyed(prompts, out)
    assert (found.num_answers, found.num_missing) == (4, 2)


def test_all_faults_come_at_once_and_many_are_counted(tmp_path: Path) -> None:
    """Twenty are listed with their lines; an id that is there twice is one of them; nothing is written."""
    lines: list[dict[str, Any]] = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}, {"prompt": "c", "id": 1}]
    lines += [{"question": number} for number in range(30)]
    prompts = write_prompts(tmp_path, lines)
    with pytest.raises(PromptFileError) as caught:
        surveyed(prompts, tmp_path / "out")
    text = str(caught.value)
    assert text.splitlines()[0].endswith("prompts.jsonl has 61 faults:")
    assert text.splitlines()[1] == "  - line 3: the id 1 is that of line 1, too"
    assert len(text.splitlines()) == 22
    assert text.endswith("... and 41 more")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [{"prompt": "inserted"}, *lines],
        lambda lines: [*lines[:1], {"prompt": "changed"}],
        lambda lines: lines[:1],
    ],
)
def test_results_of_other_prompts_are_refused(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """A line in between, a changed prompt, one that is gone; lines at the end are welcome, and so are other places
    for lines with ids."""
    lines: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b"}]
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path, lines)
    run(prompts, out, FakeBatch())
    assert surveyed(write_prompts(tmp_path, [*lines, {"prompt": "c"}]), out).num_missing == 1
    with pytest.raises(ResultFileError, match="name another file with --out"):
        surveyed(write_prompts(tmp_path, change(lines)), out)
    with pytest.raises(ResultFileError, match="other sampling options"):
        surveyed(write_prompts(tmp_path, lines), out, BatchDefaults({"greedy": True}))


def test_ids_may_change_places(tmp_path: Path) -> None:
    """Answers are found by them, not by the line."""
    lines: list[dict[str, Any]] = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": 2}]
    out = tmp_path / "out"
    run(write_prompts(tmp_path, lines), out, FakeBatch())
    assert surveyed(write_prompts(tmp_path, [{"prompt": "c", "id": "2"}, *reversed(lines)]), out).num_missing == 1


def test_answers_to_one_request_come_in_order() -> None:
    """Whichever ends first; an interruption drops those under way."""
    request = Request(ChatPrompt((ChatTurn("user", "", "q"),)), DEFAULTS, 5)
    assert [each.ticket for each in answers_to(FakeBatch(), request)] == [1, 2, 3, 4, 5]

    def interrupt() -> None:
        raise Interruption

    backend = FakeBatch(interrupt)
    with pytest.raises(Interruption):
        answers_to(backend, request)
    assert backend.was_dropped


def test_answers_of_two_models_do_not_come_into_one_file(tmp_path: Path) -> None:
    """Each line names its model; a run with another precision is refused before it asks, and changes nothing."""
    prompts, out = write_prompts(tmp_path, [{"prompt": "a"}, {"prompt": "broken"}]), tmp_path / "out"
    run(prompts, out, FakeBatch())
    assert {str(line["model"]) for line in results(out)} == {
        str({"name": "fake-model", "fingerprint": "f1", "precision": "fp32", "chat_format": "chatglm2"})
    }
    before, other = out.read_bytes(), FakeBatch(precision="int8, lm_head int8")
    with pytest.raises(ResultFileError, match=r"fake-model, and now another would answer \(precision int8, lm_head"):
        run(prompts, out, other)
    assert (out.read_bytes(), other.requests) == (before, [])
    run(prompts, out, FakeBatch())
    assert len(results(out)) == 3
