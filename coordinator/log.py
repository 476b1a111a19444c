"""What a command tells stderr: lines for people, or, with `--log-json`, one JSON object a line.

Every object has `time` (UTC, ISO 8601), `level` (debug, info, warning, error, critical), `process` (coordinator or
worker), `pid`, `event` and `message`; `stage` (from 1), `device` and `epoch` where they are known. No text of a request
or of an answer is among them, unless `--log-prompts` asks for it.
"""

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TextIO

from glm.printable import printable_line, printable_lines
from glm.standard_streams import num_lost_writes

Field = str | int | None
Stream = Callable[[], TextIO | None]
LEVELS = ("debug", "info", "warning", "error", "critical")


def shown(text: str) -> str:
    """As a terminal or a log may get it: no control characters, and no further line that begins like an event."""
    first, *more = printable_lines(text).split("\n")
    return "\n".join([first, *(line if line[:1].isspace() else f"  {line}" for line in more)])


def one_line(text: str) -> str:
    """What a peer said in words, for a place inside a line."""
    return printable_line(" ".join(text.split()))


class LineWriter:
    """Lines to a stream whose disk may be full, or whose reader gone: then they are lost, and counted. Nobody fails.

    `stream` says at each line where it goes; `lost` is the line that tells how many were. Safe from several threads.
    """

    def __init__(self, stream: Stream, lost: Callable[[int], str]) -> None:
        self._stream = stream
        self._lost = lost
        self._num_lost = 0
        self._lock = threading.Lock()

    def __call__(self, line: str) -> None:
        """Write a line, and before it how many went missing, if any did."""
        with self._lock:  # each worker's lines come in a thread of their own
            stream = self._stream()
            if stream is None:
                return
            if self._num_lost and _is_written(
                stream, f"\n{self._lost(self._num_lost)}\n"
            ):  # the one before may be torn
                self._num_lost = 0
            if self._num_lost or not _is_written(stream, f"{line}\n"):
                self._num_lost += 1


def _is_written(stream: TextIO, text: str) -> bool:
    before = num_lost_writes(stream)
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):  # a full disk, a pipe that nobody reads, a stream that was closed
        return False
    return num_lost_writes(stream) == before


def lines_lost(number: int) -> str:
    """What is said of lines that went missing."""
    return f"{number} lines of this log could not be written"


to_stderr = LineWriter(lambda: sys.stderr, lines_lost)
"""One event of a command, for people; the stream is that of the moment, which a terminal's panel may have replaced."""


class WorkerLine(str):
    """One line of a worker, for people: `[stage 1 cpu] INFO joined ...`; its parts are `text` and `fields`.

    A worker that writes JSON is read; whatever else comes (torch's own warnings, say) is the text as it is.
    """

    __slots__ = ("fields", "text")
    text: str
    fields: Mapping[str, Field]

    def __new__(cls, stage_number: int, device: str, written: str) -> "WorkerLine":
        said = _said(written)
        text = printable_line(written if said is None else f"{str(said['level']).upper()} {said['message']}")
        line = super().__new__(cls, f"[stage {stage_number} {device}] {text}")
        line.text = text
        fields = {"level": "info", "event": "output", "message": written} if said is None else said
        line.fields = {**fields, "process": "worker", "stage": stage_number, "device": device}
        return line


class Log:
    """Lines for people, on stderr."""

    is_json = False
    is_quiet = False
    """Whether only what went wrong is shown."""

    def say(self, *lines: str, **_: Field) -> None:
        """One event a line. Its fields, `event` and `level` among them, are for programs and not shown here."""
        for line in lines:
            to_stderr(shown(line))

    def failed(self, error: Exception) -> None:
        """What ended the command; an error for users."""
        self.say(f"glmpipe: {error}", event="failed", level="error")


class QuietLog(Log):
    """Warnings and errors alone, those of the workers included."""

    is_quiet = True

    def say(self, *lines: str, **fields: Field) -> None:
        for line in lines:
            level = line.fields["level"] if isinstance(line, WorkerLine) else fields.get("level", "info")
            if level not in ("debug", "info"):
                super().say(line)


class JsonLog(Log):
    """One JSON object a line, on `stream` (stderr). Lines of workers become objects of their stage."""

    is_json = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self._write_line = LineWriter(lambda: stream or sys.stderr, self._lost)

    def say(self, *lines: str, **fields: Field) -> None:
        for line in lines:
            if isinstance(line, WorkerLine):
                self._write(line.fields)
            else:
                given = {name: value for name, value in fields.items() if value is not None}
                self._write({"level": "info", "event": "note", "pid": os.getpid(), "message": line, **given})

    def failed(self, error: Exception) -> None:
        self.say(str(error), event="failed", level="error", error=type(error).__name__)

    def broke(self, error: Exception) -> None:
        """An error of our own. Where it happened, but not its text, which may quote what was being worked on."""
        frames = [
            f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
        ]
        text = f"internal error: {type(error).__name__}, at {' < '.join(reversed(frames))}"
        self.say(text, event="failed", level="critical", error=type(error).__name__)

    def take_over_logging(self) -> None:
        """Events of Python's `logging`, and its warnings, become objects, too."""
        logging.captureWarnings(True)
        root = logging.getLogger()
        root.addHandler(_Handler(self))
        logging.getLogger("coordinator").setLevel(logging.INFO)

    def _write(self, fields: Mapping[str, Field]) -> None:
        self._write_line(self._object(fields))

    def _lost(self, number: int) -> str:
        lost: dict[str, Field] = {"level": "warning", "event": "note", "pid": os.getpid()}
        return self._object({**lost, "message": lines_lost(number)})

    def _object(self, fields: Mapping[str, Field]) -> str:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "process": "coordinator", **fields})  # ASCII: no terminal's encoding breaks it


class _Handler(logging.Handler):
    def __init__(self, log: JsonLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(record.getMessage(), event=record.name, level=record.levelname.lower())


def _said(written: str) -> dict[str, Field] | None:
    """The fields of a worker's JSON line that are known here, None if it is none."""
    if not written.startswith("{"):
        return None
    try:
        given = json.loads(written)
    except (ValueError, RecursionError):
        return None
    if not isinstance(given, dict) or given.get("level") not in LEVELS or not isinstance(given.get("message"), str):
        return None
    kinds = {"time": str, "level": str, "event": str, "pid": int, "worker": str, "epoch": int, "message": str}
    return {name: given[name] for name, kind in kinds.items() if type(given.get(name)) is kind}
