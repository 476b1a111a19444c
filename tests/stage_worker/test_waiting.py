"""A worker that nobody answers says so soon, with what may be the matter, and then rarely."""

import logging

import pytest

from stage_worker.log import logger
from stage_worker.waiting import AFTER_AN_ANSWER_S, LONGEST_PAUSE_S, RefusalNotes, WaitingNotes


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the worker's own logger gets, whatever another test has made of it."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, "stage_worker")
    return caplog


@pytest.mark.parametrize(
    ("endpoint", "timeout_s", "has_key", "remedy"),
    [
        ("tcp://127.0.0.1:7410", 60.0, False, "nobody without the --key that is in the command it printed"),
        ("ipc:///tmp/g/control", 60.0, False, "is the launch still running"),
        ("tcp://192.0.2.1:7410", None, True, "do firewalls let this port through?"),
    ],
)
def test_it_says_where_it_waits_and_what_may_be_wrong(
    endpoint: str, timeout_s: float | None, has_key: bool, remedy: str, said: pytest.LogCaptureFixture
) -> None:
    """After two seconds, in one line, with how long it will go on."""
    notes = WaitingNotes(endpoint, timeout_s, has_key=has_key)
    notes.wait(1.9)
    assert said.messages == []
    notes.wait(0.2)
    (line,) = said.messages
    assert line.startswith(f"nobody has answered at {endpoint} for 2 s: ")
    assert remedy in line
    end = "waiting for as long as it takes" if timeout_s is None else "leaving if nobody has by 60 s (--join-timeout)"
    assert line.endswith(end)


def test_it_says_so_ever_more_rarely(said: pytest.LogCaptureFixture) -> None:
    """A day of waiting fills no log, and none of it is silent for long."""
    notes = WaitingNotes("tcp://192.0.2.1:7410", None, has_key=True)
    for _ in range(24 * 3600):
        notes.wait(1.0)
    assert 100 < len(said.messages) < 200
    assert ["for 12 s" in line or "for 72 s" in line for line in said.messages[1:3]] == [True, True]


def test_a_refusal_is_an_answer(said: pytest.LogCaptureFixture) -> None:
    """It is told as such; after the last one there is some time before silence is worth a word."""
    notes = WaitingNotes("tcp://192.0.2.1:7410", None, has_key=True)
    for _ in range(100):
        notes.answered()
        notes.wait(AFTER_AN_ANSWER_S - 1)
    assert said.messages == []
    notes.wait(1)
    assert len(said.messages) == 1


def test_a_refusal_without_end_fills_no_log(said: pytest.LogCaptureFixture) -> None:
    """A day of a wrong --key, tried every two seconds: told at once, then ever more rarely, with how often it was."""
    now_s = 0.0
    notes = RefusalNotes(lambda: now_s)
    for _ in range(24 * 60 * 30):
        notes.say("not let in: whoever answers there has another key")
        now_s += 2.0
    assert said.messages[:2] == [
        "not let in: whoever answers there has another key",
        "not let in: whoever answers there has another key (4 times more since)",
    ]
    assert len(said.messages) < 5 + 24 * 3600 / LONGEST_PAUSE_S
    notes.say("something else")
    assert said.messages[-1] == "something else"
    notes.over()
    notes.say("something else")
    assert said.messages[-2:] == ["something else"] * 2
