"""What is kept of a finished step: when everybody was at it, and durations that add up to the same."""

import itertools

import pytest
import torch

from coordinator.pipeline import Outcome
from coordinator.timing import EndsClock, Interval, SpanRecord, Stopwatch, step_record, step_timing
from protocol.data import Span, StageTiming, Step, StepFailed

SPANS = (Span(7, 3, 2, None, None), Span(9, 0, 1, 4, None))
STAGES = (StageTiming(0, 1.5, 0.25, 1.75, 40), StageTiming(1, 2.0, 0.5, 2.5, 41))


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second each time somebody looks at it."""
    monkeypatch.setattr("time.monotonic", itertools.count(10.0).__next__)


@pytest.mark.usefixtures("ticks")
def test_a_stopwatch_keeps_its_laps_and_adds_them_up() -> None:
    """It may run more than once, and an exception inside ends its lap, too."""
    stopwatch = Stopwatch()
    with stopwatch:
        pass
    with pytest.raises(ValueError, match="inside"), stopwatch:
        raise ValueError("inside")
    assert stopwatch.laps == [(10.0, 11.0), (12.0, 13.0)]
    assert stopwatch.total_s == 2.0
    assert Stopwatch().total_s == 0.0


@pytest.mark.usefixtures("ticks")
def test_a_record_says_what_a_step_fed_and_who_was_at_it_when() -> None:
    """The stages' stamps are kept as they were sent; the coordinator's parts are in order of time."""
    clock = EndsClock()
    with clock.embedding:
        pass
    with clock.head:
        pass
    with clock.sampling:
        pass
    outcome = Outcome(Step(1, 5, (), SPANS, STAGES), torch.zeros(3, 4), 11.5, 11.75)
    record = step_record(outcome, SPANS, clock, kind="decode", num_new_tokens=2)
    assert (record.step_id, record.kind, record.failed, record.num_new_tokens) == (5, "decode", False, 2)
    assert record.spans == (SpanRecord(7, 3, 2), SpanRecord(9, 0, 1))
    assert record.num_tokens == 3
    assert record.stages == STAGES
    assert (record.submitted_at_s, record.arrived_at_s) == (11.5, 11.75)
    assert record.ends == (Interval("embed", 10.0, 11.0), Interval("head", 12.0, 13.0), Interval("sample", 14.0, 15.0))
    ends = step_timing(outcome, clock).ends
    assert (ends.embedding_s, ends.head_s, ends.sampling_s) == (1.0, 1.0, 1.0)


def test_a_failed_step_has_a_record_too() -> None:
    """With what it was sent with and the stages that saw it."""
    outcome = Outcome(StepFailed(1, 6, 1, "kv_budget", "full", (), STAGES), None, 1.0, 3.0)
    record = step_record(outcome, SPANS, EndsClock(), kind="prefill")
    assert record.failed
    assert (record.step_id, record.num_tokens, record.num_new_tokens) == (6, 3, 0)
    assert record.stages == STAGES
    assert record.ends == ()


def test_other_hosts_clocks_are_not_compared() -> None:
    """Whatever the other host's clock says, its stay counts; the hops between hosts share what is left, and say so."""
    for offset_s in (0.0, 1e6, -1e6):
        far = StageTiming(1, offset_s + 5.0, 0.5, offset_s + 6.0, 41)
        stages = (StageTiming(0, 1.5, 0.25, 2.0, 40), far, StageTiming(2, 5.0, 0.25, 5.5, 42))
        outcome = Outcome(Step(1, 5, (), SPANS, stages), torch.zeros(3, 4), 1.0, 6.0, (None, "lab2", None))
        timing = step_timing(outcome, EndsClock())
        # 5 s in all: stages had it for 0.5 + 1 + 0.5, hops inside this host took 0.5 + 0.5, the two others the rest.
        assert [share.wire_s for share in timing.stages] == pytest.approx([0.5, 1.0, 1.5])
        assert [share.is_wire_derived for share in timing.stages] == [False, True, True]
        assert timing.ends.wire_s == pytest.approx(0.5)
        record = step_record(outcome, SPANS, EndsClock(), kind="decode")
        assert [stage.received_at_s for stage in record.stages] == pytest.approx([1.5, 3.0, 5.0])
        assert [stage.sent_at_s for stage in record.stages] == pytest.approx([2.0, 4.0, 5.5])


def test_stages_of_one_other_host_share_its_clock() -> None:
    """The hop between them is measured; one stage elsewhere makes the way there and back a guess."""
    stages = (StageTiming(0, 101.0, 0.5, 102.0, 40), StageTiming(1, 102.25, 0.5, 103.0, 41))
    outcome = Outcome(Step(1, 5, (), SPANS, stages), torch.zeros(3, 4), 0.0, 3.0, ("lab2", "lab2"))
    timing = step_timing(outcome, EndsClock())
    assert [share.wire_s for share in timing.stages] == pytest.approx([0.5, 0.75])
    assert [share.is_wire_derived for share in timing.stages] == [True, True]
