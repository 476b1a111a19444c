"""The timeline of a run: a file that can be read, rows without overlaps, every step where it was."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import UsageError
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.timing import Interval, SpanRecord, StepRecord
from coordinator.trace import Timeline, TraceFile
from protocol.data import StageTiming
from tests.in_process import in_process_engine, sequence_for
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

PLAN = Plan((StagePlan("cpu", 0, 3, "fp32"), StagePlan("cpu", 3, 6, "fp32")), EndsPlan(*("cpu", "fp32") * 2, "cpu"))
Event = dict[str, Any]


def a_step(step_id: int, start_s: float, **changes: Any) -> StepRecord:
    """Embeds for 1 s, computes for 2 s on each of two stages with a hop of 1 s before each and after, heads, samples.

    Stages that are at another step take it a second later than they might.
    """
    facts: dict[str, Any] = {
        "step_id": step_id,
        "kind": "decode",
        "spans": (SpanRecord(7, 3, 1), SpanRecord(8, 9, 2)),
        "submitted_at_s": start_s + 1,
        "arrived_at_s": start_s + 8,
        "stages": (
            StageTiming(0, start_s + 2, 2.0, start_s + 4, 40),
            StageTiming(1, start_s + 5, 2.0, start_s + 7, 40 + step_id),
        ),
        "failed": False,
        "ends": (
            Interval("embed", start_s, start_s + 1),
            Interval("head", start_s + 8, start_s + 8.5),
            Interval("sample", start_s + 8.5, start_s + 8.75),
        ),
        "num_new_tokens": 2,
    }
    return StepRecord(**{**facts, **changes})


def read(path: Path) -> list[Event]:
    events = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(events, list)
    return events


def rows_of(events: list[Event]) -> dict[str, list[Event]]:
    """The slices of each row, by `process/row`."""
    names = {
        (e["name"], e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["ph"] == "M" and "name" in e["args"]
    }
    rows: dict[str, list[Event]] = {}
    for event in events:
        if event["ph"] == "X":
            process = names["process_name", event["pid"], None]
            row = names["thread_name", event["pid"], event["tid"]]
            rows.setdefault(f"{process}/{row}", []).append(event)
    return rows


def assert_no_overlaps(rows: dict[str, list[Event]]) -> None:
    for slices in rows.values():
        for before, after in pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-3


def test_a_trace_is_json_with_a_row_for_whatever_each_process_does(tmp_path: Path) -> None:
    """Every step is in every row, with what it fed; times are microseconds since the first began."""
    path = tmp_path / "trace.json"
    with TraceFile(path, PLAN, pytest.fail) as trace:
        trace(a_step(1, 1000.0))
        trace(a_step(2, 1009.0))
    rows = rows_of(read(path))
    assert set(rows) == {
        *(f"coordinator/{row}" for row in ("embed", "head", "sample", "wire")),
        *(f"stage 1 (cpu, layers 1-3)/{row}" for row in ("compute", "wire")),
        *(f"stage 2 (cpu, layers 4-6)/{row}" for row in ("compute", "wire")),
    }
    assert all([e["args"]["step"] for e in slices] == [1, 2] for slices in rows.values())
    assert_no_overlaps(rows)
    compute = rows["stage 2 (cpu, layers 4-6)/compute"][0]
    assert (compute["name"], compute["ts"], compute["dur"]) == ("decode", 5e6, 2e6)
    assert compute["args"] == {"step": 1, "kind": "decode", "sequences": [7, 8], "tokens": 3}


def test_a_run_over_two_stages_is_traced_step_by_step(tmp_path: Path) -> None:
    """Three sequences, one of them with a prompt in pieces: no step is missing in any row."""
    write_checkpoint(tmp_path, CAUSAL)
    engine, _, config = in_process_engine(tmp_path, [(0, 2), (2, 4)], max_steps_in_flight=3, prefill_chunk=8)
    path, records = tmp_path / "trace.json", list[StepRecord]()
    with TraceFile(path, PLAN, pytest.fail) as trace:
        engine.observers += [records.append, trace]
        sequences = [sequence_for(engine, config, [3 + i] * (1 + 10 * i)) for i in range(3)]
        while not engine.is_idle:
            engine.step()
    assert all(sequence.finish_reason == "length" for sequence in sequences)
    rows = rows_of(read(path))
    assert_no_overlaps(rows)
    steps = [record.step_id for record in records]
    assert len(steps) > 8
    assert {record.kind for record in records} == {"prefill", "decode"}
    for name, slices in rows.items():
        assert [event["args"]["step"] for event in slices] == steps, name
    fed = sum(event["args"]["tokens"] for event in rows["coordinator/embed"])
    assert fed == sum(record.num_tokens for record in records)


def test_what_waits_behind_another_step_is_drawn_behind_it() -> None:
    """Two steps whose ways to a busy stage overlap in time do not overlap in its row; who waited how long is said."""
    timeline = Timeline(["one", "two"])
    first = a_step(1, 0.0)
    late = (StageTiming(0, 4.0, 2.0, 6.0, 40), StageTiming(1, 7.0, 2.0, 9.0, 41))
    events = timeline.events(first) + timeline.events(a_step(2, 0.5, stages=late, arrived_at_s=10.0, ends=()))
    wires = [e for e in events if e["ph"] == "X" and e["tid"] == 20]
    assert [(e["ts"], e["dur"]) for e in wires] == [(1e6, 1e6), (2e6, 2e6)]
    assert wires[1]["args"]["waited behind another, us"] == 5e5


def test_arrows_follow_a_step_from_its_first_slice_to_its_last() -> None:
    """One id for each step: out of the first, in and out of those between, into the last."""
    slices = [e for e in Timeline(["one", "two"]).events(a_step(3, 0.0)) if e["ph"] == "X"]
    way = sorted(slices, key=lambda e: e["ts"])
    assert {e["bind_id"] for e in way} == {"0x3"}
    assert ["flow_in" in e for e in way] == [False] + [True] * (len(way) - 1)
    assert ["flow_out" in e for e in way] == [True] * (len(way) - 1) + [False]
    assert [(e["pid"], e["tid"]) for e in way] == [
        (1, 10),
        (2, 20),
        (2, 21),
        (3, 30),
        (3, 31),
        (1, 13),
        (1, 11),
        (1, 12),
    ]


def test_counters_say_kv_tokens_and_steps_in_flight() -> None:
    """Steps in flight are counted at the times they were sent and came back, also where those interleave."""
    timeline = Timeline(["one", "two"])
    events = [e for start_s in (0.0, 2.0, 4.0, 20.0) for e in timeline.events(a_step(int(start_s) + 1, start_s))]
    events += timeline.rest()
    counts = [(e["ts"] / 1e6, e["args"]["steps in flight"]) for e in events if e["name"] == "steps in flight"]
    assert counts == [(1, 1), (3, 2), (5, 3), (8, 2), (10, 1), (12, 0), (21, 1), (28, 0)]
    tokens = [(e["pid"], e["args"]["KV tokens"]) for e in events if e["name"] == "KV tokens"]
    assert tokens[:4] == [(2, 40), (3, 41), (2, 40), (3, 43)]


def test_another_hosts_clock_is_set_by_its_offset() -> None:
    """Its stamps are shifted to this host's clock before anything is drawn."""
    here = Timeline(["one", "two"]).events(a_step(1, 0.0))
    stages = tuple(StageTiming(i, 2 + 3 * i + o, 2.0, 4 + 3 * i + o, 40 + i) for i, o in enumerate((100.0, 0.0)))
    assert Timeline(["one", "two"], [-100.0, 0.0]).events(a_step(1, 0.0, stages=stages)) == here


def test_a_failed_step_is_drawn_as_far_as_it_came() -> None:
    """It says so in its name, and the stages it did not reach have nothing."""
    record = a_step(1, 0.0, failed=True, stages=(StageTiming(0, 2.0, 1.0, 4.0, 0),), ends=())
    slices = [e for e in Timeline(["one", "two"]).events(record) if e["ph"] == "X"]
    assert {e["name"] for e in slices} == {"decode failed"}
    assert {e["pid"] for e in slices} == {1, 2}


def test_a_trace_is_complete_after_an_interruption_too(tmp_path: Path) -> None:
    """Whatever ends the run, what was seen until then can be read; an empty trace as well."""
    path = tmp_path / "trace.json"
    with pytest.raises(KeyboardInterrupt), TraceFile(path, PLAN, pytest.fail) as trace:
        trace(a_step(1, 1e9))
        raise KeyboardInterrupt
    assert "X" in {event["ph"] for event in read(path)}
    TraceFile(path, PLAN, pytest.fail).close()
    assert {event["ph"] for event in read(path)} == {"M"}


def test_a_file_that_cannot_be_written_is_told_and_stops_nothing(tmp_path: Path) -> None:
    """Before anything loads if it cannot be begun; in one line if the disk is full later."""
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        TraceFile(tmp_path, PLAN, pytest.fail)
    notes: list[str] = []
    with TraceFile(Path("/dev/full"), PLAN, notes.append) as trace:
        for step_id in range(1000):
            trace(a_step(step_id, 1e9 + 10 * step_id))
    assert len(notes) == 1
    assert "No space left" in notes[0]
