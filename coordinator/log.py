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
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

Field = str | int | None
LEVELS = ("debug", "info", "warning", "error", "critical")


class WorkerLine(str):
    """One line of a worker, for people: `[stage 1 cpu] INFO joined ...`; its parts are `text` and `fields`.

    A worker that writes JSON is read; whatever else comes (torch's own warnings, say) is the text as it is.
    """

    __slots__ = ("fields", "text")
    text: str
    fields: Mapping[str, Field]

    def __new__(cls, stage_number: int, device: str, written: str) -> "WorkerLine":
        said = _said(written)
        text = written if said is None else f"{str(said['level']).upper()} {said['message']}"
        line = super().__new__(cls, f"[stage {stage_number} {device}] {text}")
        line.text = text
        fields = {"level": "info", "event": "output", "message": written} if said is None else said
        line.fields = {**fields, "process": "worker", "stage": stage_number, "device": device}
        return line


class Log:
    """Lines for people, on stderr."""

    is_json = False

    def say(self, *lines: str, **_: Field) -> None:
        """One event a line. Its fields, `event` and `level` among them, are for programs and not shown here."""
        for line in lines:
            print(line, file=sys.stderr, flush=True)

    def failed(self, error: Exception) -> None:
        """What ended the command; an error for users."""
        self.say(f"glmpipe: {error}", event="failed", level="error")


class JsonLog(Log):
    """One JSON object a line, on `stream` (stderr). Lines of workers become objects of their stage."""

    is_json = True

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

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
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "process": "coordinator", **fields})  # ASCII: no terminal's encoding breaks it
        stream = self._stream or sys.stderr
        with self._lock:  # each worker's lines come in a thread of their own
            stream.write(f"{line}\n")
            stream.flush()


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
