"""What keeping stages busy gains: shares and ratios out of records and speeds."""

import pytest

from benchmarks.scheduling import busy_shares, stream_figures
from coordinator.timing import StepRecord
from protocol.data import StageTiming


def record(step_id: int, *stages: tuple[float, float]) -> StepRecord:
    """A step whose stages computed from and until these times."""
    timings = tuple(StageTiming(i, begin, end - begin, end, 4) for i, (begin, end) in enumerate(stages))
    return StepRecord(step_id, "decode", (), 0.0, 10.0, timings, False, (), 4)


def test_a_stage_is_busy_while_it_computes_within_the_window() -> None:
    """What was computed before the window does not count, steps that carried updates only neither."""
    records = [record(1, (0.0, 2.0), (2.0, 4.0)), record(2), record(3, (2.0, 4.5), (4.5, 5.0))]
    assert busy_shares(records, 1.0, 5.0) == pytest.approx([3.5 / 4, 2.5 / 4])


def test_the_time_of_a_token_doubles_where_twice_the_streams_are_no_faster() -> None:
    """And the automatic choice is held against the fixed setting that was best over all rounds."""
    speeds = {
        "4 in one": [10.0, 20.0],
        "8 in 1": [12.0, 24.0],
        "8 in 2": [10.0, 36.0],
        "8 in 3": [11.0, 30.0],
        "8 automatic": [10.0, 35.0],
    }
    figures = {figure.what: figure for figure in stream_figures(speeds, {2: [[0.9, 0.8], [0.92, 0.8]]})}
    assert figures["8 in two steps over 4 in one, tokens/s"].values == pytest.approx((1.0, 1.8))
    assert figures["the same, time of a token"].values == pytest.approx((2.0, 1 / 0.9))
    assert figures["automatic over the best (8 in 2)"].values == pytest.approx((1.0, 35 / 36))
    assert figures["stage 1 busy, 8 in 2 steps"].is_met is True
    assert figures["stage 2 busy, 8 in 2 steps"].is_met is False
