"""What a worker writes: bounded, whatever arrives."""

import errno
import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from stage_worker.log import MAX_LINES, PERIOD_S, RateLimit, facts, logger, set_up_logging


def test_a_flood_of_one_kind_is_cut_and_counted() -> None:
    """Only so many lines of a kind pass in a period; the first of the next period counts those left out."""
    now_s = 0.0
    limit = RateLimit(clock=lambda: now_s)

    def passed(text: str, *values: object) -> str | None:
        record = logging.LogRecord("stage_worker", logging.WARNING, "", 0, text, values, None)
        return record.getMessage() if limit.filter(record) else None

    lines = [passed("dropped a data message: %s", number) for number in range(10_000)]
    assert [line for line in lines if line] == [f"dropped a data message: {n}" for n in range(MAX_LINES)]
    assert passed("leaving: %s", "SIGTERM") == "leaving: SIGTERM"
    now_s = PERIOD_S
    left_out = 10_000 - MAX_LINES
    assert passed("dropped a data message: %s", "x %s") == (
        f"dropped a data message: x %s ({left_out} more like it were left out before)"
    )
    assert passed("dropped a data message: %s", "y") == "dropped a data message: y"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    stream, handlers = io.StringIO(), list(logger.handlers)
    monkeypatch.setattr(sys, "stderr", stream)
    set_up_logging(as_json=True)
    facts.update(worker="stage-1", device="cpu")
    yield stream
    facts.clear()
    logger.handlers[:] = handlers


def test_an_event_is_one_json_object(written: io.StringIO) -> None:
    """Whatever its text holds; with the stage and the epoch while there are any."""
    logger.info("joined %s", "x")
    facts.update(stage=2, epoch=5)
    logger.warning("dropped: %s", 'a\nb "c" \x1b[2J\udc80你')
    first, second = map(json.loads, written.getvalue().splitlines())
    assert {"time", "pid"} < first.keys()
    assert (first["level"], first["process"], first["worker"], first["message"]) == (
        "info",
        "worker",
        "stage-1",
        "joined x",
    )
    assert "stage" not in first
    assert (second["stage"], second["epoch"], second["message"]) == (2, 5, 'dropped: a b "c" \\x1b[2J\\udc80你')
    assert written.getvalue().isascii()


class FullDisk(io.StringIO):
    """Takes nothing while it is full."""

    is_full = False

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_full_disk_costs_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted, and told when there is room again; nothing is raised, nothing is printed beside it."""
    stream, handlers = FullDisk(), list(logger.handlers)
    monkeypatch.setattr(sys, "stderr", stream)
    set_up_logging()
    try:
        logger.info("one")
        stream.is_full = True
        for number in range(5):
            logger.info("lost %d", number)
        stream.is_full = False
        logger.info("two")
        logger.info("three")
    finally:
        logger.handlers[:] = handlers
    lost = "WARNING 5 lines of this log could not be written"
    assert stream.getvalue().splitlines() == ["INFO one", "", lost, "INFO two", "INFO three"]
