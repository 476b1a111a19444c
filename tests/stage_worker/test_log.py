"""What a worker writes: bounded, whatever arrives."""

import logging

from stage_worker.log import MAX_LINES, PERIOD_S, RateLimit


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
