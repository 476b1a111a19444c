"""What goes to stderr: the lines people read, and the same as JSON objects, each of them once encoded."""

import errno
import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.cluster_settings import StageProgress
from coordinator.legible import legible
from coordinator.log import JsonLog, Log, WorkerLine
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.progress import load_view
from coordinator.request_log import RequestLog
from protocol import client
from protocol.control import Failed, Leaving, Ready
from protocol.data import StepFailed

ROOT = Path(__file__).resolve().parents[2]
SECRET = "marker-7b1e"
SAID = {"level": "warning", "message": 'step 3 "failed"', "epoch": 2, "pid": 7, "time": "T", "worker": "stage-1"}
PLAN = Plan((StagePlan("cpu", 0, 1, "fp32"),), EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32"))
SAMPLING = client.SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (SECRET,), 4, False, True)


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_workers_json_line_is_one_line_for_people() -> None:
    """With its stage in front, its level, and its text as it was."""
    line = WorkerLine(2, "cpu", json.dumps(SAID))
    assert line == '[stage 2 cpu] WARNING step 3 "failed"'
    assert line.text == 'WARNING step 3 "failed"'


def test_a_workers_json_line_is_relayed_as_one_object() -> None:
    """Its text is not encoded a second time; stage and device are the launcher's."""
    stream = io.StringIO()
    JsonLog(stream).say(WorkerLine(2, "cpu", json.dumps({**SAID, "stage": 9, "process": "root"})))
    [found] = objects(stream)
    assert found == {**SAID, "process": "worker", "stage": 2, "device": "cpu"}


@pytest.mark.parametrize(
    "written",
    [
        "torch: a warning",
        "{not json",
        "[1]",
        '{"message": "x"}',
        '{"level": "loud", "message": "x"}',
        '{"level": ["info"], "message": "x"}',
        '{"level": "info", "message": 5}',
        "{" * 5000,
        '{"a":' * 5000,
    ],
)
def test_whatever_else_a_worker_prints_is_text(written: str) -> None:
    """Shown as it is, and one JSON string of an object."""
    line = WorkerLine(1, "cuda:0", written)
    assert line == f"[stage 1 cuda:0] {written}"
    stream = io.StringIO()
    JsonLog(stream).say(line)
    [found] = objects(stream)
    assert (found["message"], found["event"], found["stage"]) == (written, "output", 1)


def test_fields_that_are_unknown_or_mistyped_are_not_passed_on() -> None:
    """A worker cannot put what it likes into a launch's log."""
    line = WorkerLine(1, "cpu", json.dumps({**SAID, "epoch": True, "pid": "x", "more": "y"}))
    assert set(line.fields) == {"level", "message", "time", "worker", "process", "stage", "device"}


def test_lines_for_people_are_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    """Fields are for programs."""
    Log().say("one", "two", event="note", stage=3)
    Log().failed(ValueError("three"))
    assert capsys.readouterr().err == "one\ntwo\nglmpipe: three\n"


def test_every_object_says_when_who_and_what() -> None:
    """On one line whatever the text holds; what is not known is left out."""
    stream = io.StringIO()
    JsonLog(stream).say("a\nb\u2028c 你好\udc80", event="pipeline", epoch=4, stage=None)
    [found] = objects(stream)
    assert found["message"] == "a\nb\u2028c 你好\udc80"
    assert found.keys() == {"time", "level", "process", "pid", "event", "message", "epoch"}
    assert (found["process"], found["level"], found["epoch"]) == ("coordinator", "info", 4)
    assert stream.getvalue().isascii()


class Interrupted(io.StringIO):
    """Lets other threads run after each write, as a full pipe does."""

    def write(self, text: str) -> int:
        written = super().write(text)
        time.sleep(0.0001)
        return written


def test_lines_of_several_threads_stay_apart() -> None:
    """A newline belongs to its line."""
    stream = Interrupted()
    log = JsonLog(stream)
    threads = [threading.Thread(target=lambda: [log.say("x") for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found["message"] for found in objects(stream)] == ["x"] * 200


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    yield
    root.handlers[:] = handlers
    logging.captureWarnings(False)
    logging.getLogger("coordinator").setLevel(logging.NOTSET)


@pytest.mark.usefixtures("restored_logging")
def test_events_of_logging_become_objects() -> None:
    """What modules say through `logging` is not missing."""
    stream = io.StringIO()
    JsonLog(stream).take_over_logging()
    logging.getLogger("coordinator.service").info("a client is %s", "gone")
    assert [(found["message"], found["event"]) for found in objects(stream)] == [
        ("a client is gone", "coordinator.service")
    ]


def test_an_error_of_our_own_does_not_quote_what_it_was_about() -> None:
    """Its type and its place are logged, its text is not."""
    stream = io.StringIO()
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        JsonLog(stream).broke(error)
    [found] = objects(stream)
    assert (found["level"], found["error"]) == ("critical", "KeyError")
    assert "test_log.py:" in found["message"]
    assert SECRET not in stream.getvalue()


def requests_said(log: Log, *, with_text: bool) -> None:
    """A chat, a continuation and a request that failed, each with the secret in its texts."""
    requests = RequestLog(log, with_text=with_text)
    prompts = (client.ChatPrompt((client.ChatTurn("user", "", SECRET),)), client.TextPrompt(SECRET))
    for number, prompt in enumerate(prompts):
        requests.began(b"\x01\xff", client.Generate(number, prompt, SAMPLING), 12)
    stats: Any = SimpleNamespace(total_s=1.5)
    requests.ended(b"\x01\xff", client.Finished(0, "length", SECRET, (1, 2), stats))
    requests.ended(b"\x01\xff", client.Error(1, "ChatFormatError", SECRET))


def test_requests_are_logged_in_numbers() -> None:
    """Who, which, how many tokens, how it ended; no text of theirs."""
    stream = io.StringIO()
    requests_said(JsonLog(stream), with_text=False)
    assert SECRET not in stream.getvalue()
    found = objects(stream)
    assert [entry["event"] for entry in found] == ["request", "request", "answer", "request_failed"]
    assert {entry["client"] for entry in found} == {"01ff"}
    assert found[2]["message"] == "answer 0 of client 01ff: 2 new tokens in 1.50 s, length"


def test_requests_are_logged_with_their_text_if_asked_for() -> None:
    """In fields of their own."""
    stream = io.StringIO()
    requests_said(JsonLog(stream), with_text=True)
    first, second, answer, failed = objects(stream)
    assert json.loads(first["prompt"]) == [{"role": "user", "content": SECRET}]
    assert (second["prompt"], answer["answer"], failed["error_text"]) == (SECRET, SECRET, SECRET)


def test_people_read_of_requests_only_if_they_asked_for_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A launch's lines are as they always were; with the text, a request is one line."""
    requests_said(Log(), with_text=False)
    assert capsys.readouterr().err == ""
    requests_said(Log(), with_text=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(SECRET in line for line in lines)


class FullDisk(io.StringIO):
    """Takes nothing while it is full."""

    is_full = False

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_full_disk_costs_lines_and_nothing_else(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any thread, in every view: they are counted, and told when there is room again."""
    stream = FullDisk()
    monkeypatch.setattr(sys, "stderr", stream)
    log = JsonLog() if as_json else Log()
    view = load_view(PLAN, log=log)
    log.say("one")
    stream.is_full = True
    for _ in range(2):
        log.say("lost")
        view.log("lost")
        view.update(StageProgress(0, 1, 1, 100, Ready(1, 1, 100, 100, 1.0, "torch")))  # a line, and how it computes
    stream.is_full = False
    log.say("two")
    lines = list(filter(None, stream.getvalue().splitlines()))
    said = [json.loads(line)["message"] for line in lines] if as_json else lines
    assert said == ["one", "8 lines of this log could not be written", "two"]


def test_what_others_wrote_neither_acts_on_a_terminal_nor_forges_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Escape sequences are shown as text; a further line of an event is indented, and so begins like none."""
    Log().failed(ValueError("tensor 'a\x1b]0;b\x07\n[pipeline] all is well\x9b2J'\n  | its line\u202e"))
    assert capsys.readouterr().err == (
        "glmpipe: tensor 'a\\x1b]0;b\\x07\n  [pipeline] all is well\\x9b2J'\n  | its line\\u202e\n"
    )
    said = {"level": "info", "message": "ready\x1b[2J\n[stage 2 cpu] INFO forged"}
    assert WorkerLine(1, "cpu", json.dumps(said)) == "[stage 1 cpu] INFO ready\\x1b[2J\\n[stage 2 cpu] INFO forged"


@pytest.mark.parametrize(
    "message",
    [
        Ready(1, 1, 1, 1, 1.0, "torch\x1b[2J\nforged"),
        Failed(1, 1, "internal", "no\x1b[2J\nforged"),
        Leaving(0, "bye\x1b[2J\nforged"),
        StepFailed(1, 1, 0, "internal", "no\x1b[2J\nforged", (), ()),
        client.Queued(1, 1, "you\x1b[2J\nforged"),
        client.Description(1, "a\x1b[2J\nforged", "b\x1b", 9, ("c\x1b[2J\nforged",), SAMPLING, None),
    ],
)
def test_what_peers_say_in_words_is_one_line_each(message: Any) -> None:
    """Every string of every message, those inside tuples and records too; whatever has none of it stays as it is."""
    words = repr(legible(message))
    assert "x1b" in words and not re.search(r"(?<!\\)\\(x1b|n)", words), words
    assert legible(Leaving(0, "bye")) == Leaving(0, "bye")


PROGRAM = """
import resource as r, sys
from glm.standard_streams import open_standard_streams
open_standard_streams()
from {module} import {names}
{say}("one")
limits = r.getrlimit(r.RLIMIT_FSIZE)
r.setrlimit(r.RLIMIT_FSIZE, (1, limits[1]))
for number in range(3): {say}("lost")
r.setrlimit(r.RLIMIT_FSIZE, limits)
{say}("two")
"""


@pytest.mark.parametrize(
    ("module", "names", "say"),
    [
        ("coordinator.log", "Log", "Log().say"),
        ("stage_worker.log", "logger, set_up_logging; set_up_logging()", "logger.info"),
    ],
)
def test_the_programs_own_stderr_tells_what_it_lost(module: str, names: str, say: str, tmp_path: Path) -> None:
    """A file that may not grow, under the streams that both programs put in place of Python's."""
    log = tmp_path / "log"
    program = PROGRAM.format(module=module, names=names, say=say)
    with log.open("w") as stderr:
        subprocess.run([sys.executable, "-c", program], stderr=stderr, check=True, cwd=ROOT)
    first, *_, told, last = log.read_text().splitlines()
    assert first.endswith("one") and told.endswith("3 lines of this log could not be written") and last.endswith("two")
