"""Writes a run as a timeline for ui.perfetto.dev or chrome://tracing: a row for whatever each process does.

The format is the "JSON Array Format" of Google's document "Trace Event Format": `X` events have a beginning and a
duration in microseconds, `C` events are counters, `M` events name the rows, and slices that carry the same `bind_id`
are joined by arrows. Events go to the file as steps come back; one that was cut off lacks its `]`, which viewers
forgive.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from coordinator.closing import Closing
from coordinator.errors import UsageError
from coordinator.plan import Plan
from coordinator.timing import StepRecord

FLUSH_INTERVAL_S = 1.0
_NS = 1_000_000_000
_COORDINATOR_ROWS = ("embed", "head", "sample", "wire")
_STAGE_ROWS = ("wire", "compute")

Event = dict[str, Any]


class TraceFile(Closing):
    """An observer of an engine that writes what it sees to a file. A context manager; closing completes the file."""

    def __init__(self, path: Path, plan: Plan, on_note: Callable[[str], None]) -> None:
        """`on_note` hears where the file cannot be written to the end. Raises UsageError if it cannot be begun."""
        self._path = path
        self._on_note = on_note
        self._timeline = Timeline(stage_titles(plan))
        self._flushed_at_s = 0.0
        try:
            self._file: TextIO | None = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--trace {path} cannot be written: {error.strerror}") from None
        self._write("[\n" + ",\n".join(map(_json, self._timeline.names())))

    def __call__(self, record: StepRecord) -> None:
        """Write a finished step."""
        self._append(self._timeline.events(record))

    def close(self) -> None:
        """Write what is left and the end of the array. Safe to call twice."""
        self._append(self._timeline.rest())
        self._write("\n]\n", is_end=True)

    def _append(self, events: Sequence[Event]) -> None:
        """In one write, so that an interruption leaves no half of an event behind."""
        self._write("".join(",\n" + _json(event) for event in events))

    def _write(self, text: str, is_end: bool = False) -> None:
        """A full disk ends the trace, not the answers."""
        if self._file is None:
            return
        now_s = time.monotonic()
        try:
            self._file.write(text)
            if is_end:
                file, self._file = self._file, None
                file.close()
            elif now_s - self._flushed_at_s >= FLUSH_INTERVAL_S:
                self._file.flush()
                self._flushed_at_s = now_s
        except OSError as error:
            if self._file is not None:
                with suppress(OSError):  # once more for what is in its buffer
                    self._file.close()
                self._file = None
            self._on_note(f"note: the trace {self._path} ends before the run does: {error.strerror}")


@dataclass(slots=True)
class _Row:
    """A line of the timeline; what is drawn on it never overlaps."""

    process_id: int
    row_id: int
    name: str
    end_ns: int = 0


class Timeline:
    """Steps to trace events. Knows no file and no clock, only where each row ends and which steps are in flight.

    Times are counted from the beginning of the first step.
    """

    def __init__(self, titles: Sequence[str], clock_offsets_s: Sequence[float] | None = None) -> None:
        """`titles` name the stages. `clock_offsets_s` lead from each stage's clock to this host's.

        They are 0 as long as all stages run on this host and share its monotonic clock.
        """
        self._titles = titles
        self._started_at_s: float | None = None
        self._clock_offsets_s = clock_offsets_s or [0.0] * len(titles)
        self._ends = {name: _Row(1, 10 + at, name) for at, name in enumerate(_COORDINATOR_ROWS)}
        self._stages = [
            {name: _Row(number + 1, 10 * (number + 1) + at, name) for at, name in enumerate(_STAGE_ROWS)}
            for number in range(1, len(titles) + 1)
        ]
        self._in_flight = _InFlight()

    def names(self) -> Iterator[Event]:
        """What the rows are called, and their order."""
        for title, rows in zip(["coordinator", *self._titles], [self._ends, *self._stages], strict=True):
            process_id = next(iter(rows.values())).process_id
            yield {"ph": "M", "pid": process_id, "name": "process_name", "args": {"name": title}}
            yield {"ph": "M", "pid": process_id, "name": "process_sort_index", "args": {"sort_index": process_id}}
            for row in rows.values():
                place = {"ph": "M", "pid": process_id, "tid": row.row_id}
                yield {**place, "name": "thread_name", "args": {"name": row.name}}
                yield {**place, "name": "thread_sort_index", "args": {"sort_index": row.row_id}}

    def events(self, record: StepRecord) -> list[Event]:
        """All that happened to a step; steps come in the order in which they were sent."""
        if self._started_at_s is None:
            self._started_at_s = min(record.submitted_at_s, *(lap.started_at_s for lap in record.ends), math.inf)
        facts = {
            "step": record.step_id,
            "kind": record.kind,
            "sequences": [span.sequence_id for span in record.spans],
            "tokens": record.num_tokens,
        }
        name = f"{record.kind} failed" if record.failed else record.kind
        events = [
            self._slice(self._ends[lap.name], name, lap.started_at_s, lap.ended_at_s, facts) for lap in record.ends
        ]
        left_at_s = record.submitted_at_s
        for stage in record.stages:
            rows, offset_s = self._stages[stage.stage_index], self._clock_offsets_s[stage.stage_index]
            received_at_s, sent_at_s = stage.received_at_s + offset_s, stage.sent_at_s + offset_s
            events.append(self._slice(rows["wire"], name, left_at_s, received_at_s, facts))
            compute = self._slice(rows["compute"], name, sent_at_s - stage.compute_s, sent_at_s, facts)
            events += [compute, self._counter(rows["compute"].process_id, "KV tokens", sent_at_s, stage.kv_tokens)]
            left_at_s = sent_at_s
        events.append(self._slice(self._ends["wire"], name, left_at_s, record.arrived_at_s, facts))
        _join(events, record.step_id)
        return events + self._counters(self._in_flight.add(record.submitted_at_s, record.arrived_at_s))

    def rest(self) -> list[Event]:
        """What was held back until nothing could come before it any more."""
        return self._counters(self._in_flight.rest())

    def _slice(self, row: _Row, name: str, started_at_s: float, ended_at_s: float, facts: Event) -> Event:
        """On the wire, a step that waits behind another one is drawn only from where that one's way ends."""
        start_ns, end_ns = self._ns(started_at_s), self._ns(ended_at_s)
        behind_ns = max(0, min(row.end_ns, end_ns) - start_ns)
        start_ns = max(start_ns, row.end_ns)
        row.end_ns = max(start_ns, end_ns)
        return {
            "ph": "X",
            "pid": row.process_id,
            "tid": row.row_id,
            "name": name,
            "ts": start_ns / 1000,
            "dur": (row.end_ns - start_ns) / 1000,
            "args": {**facts, "waited behind another, us": behind_ns / 1000} if behind_ns else facts,
        }

    def _counters(self, changes: Sequence[tuple[float, int]]) -> list[Event]:
        return [self._counter(1, "steps in flight", at_s, number) for at_s, number in changes]

    def _counter(self, process_id: int, name: str, at_s: float, value: int) -> Event:
        return {
            "ph": "C",
            "pid": process_id,
            "name": name,
            "ts": self._ns(at_s) / 1000,
            "args": {name: value},
        }

    def _ns(self, at_s: float) -> int:
        return max(0, round((at_s - (self._started_at_s or 0.0)) * _NS))


class _InFlight:
    """How many steps are under way, from steps that are not any more.

    Others may have been sent while this one was under way; they come back later. What lies before a step was sent is
    certain once that step has come back, because steps come back in the order in which they were sent.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[float, int]] = []
        self._number = 0

    def add(self, submitted_at_s: float, arrived_at_s: float) -> list[tuple[float, int]]:
        """Take in a step; the times up to its sending at which the number changed, with the new number."""
        self._changes += [(submitted_at_s, 1), (arrived_at_s, -1)]
        self._changes.sort()
        return self._settle(submitted_at_s)

    def rest(self) -> list[tuple[float, int]]:
        """The changes after the last step was sent."""
        return self._settle(math.inf)

    def _settle(self, until_s: float) -> list[tuple[float, int]]:
        settled = []
        while self._changes and self._changes[0][0] <= until_s:
            at_s, change = self._changes.pop(0)
            self._number += change
            settled.append((at_s, self._number))
        return settled


def stage_titles(plan: Plan) -> list[str]:
    """`stage 1 (cpu, layers 1-14)`, with the host where there are several."""
    return [
        f"stage {number} ({plan.place(stage.device, stage.host)}, layers {stage.layers_text})"
        for number, stage in enumerate(plan.stages, start=1)
    ]


def _join(events: Sequence[Event], step_id: int) -> None:
    """Arrows along a step's way: from the first slice to the last, in the order of time."""
    way = sorted((event for event in events if event["ph"] == "X"), key=lambda event: event["ts"])
    for event in way:
        event["bind_id"] = hex(step_id)
        if event is not way[0]:
            event["flow_in"] = True
        if event is not way[-1]:
            event["flow_out"] = True


def _json(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False, separators=(",", ":"))
