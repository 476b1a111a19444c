"""What a model brings along and others have written, run in a process that has seconds, some memory and no files."""

import itertools
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Literal

_PROGRAM = Path(__file__).with_name("confined_program.py")


class Confined:
    """`confined_program.py`, begun with `source` and begun again where it was lost. Several threads may ask it."""

    def __init__(self, what: Literal["template", "words"], source: str) -> None:
        self._what = what
        self._source = source
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.begun = self._start()
        """What it said to the source: nothing, `error` and a text (also of the system), or None where it was lost."""

    def ask(self, question: Any) -> dict[str, Any] | None:
        """Its answer, which may be an `error`; None: it took more time or memory than it has, and was lost."""
        with self._lock:
            if self.process.poll() is not None and "error" in (begun := self._start() or {}):
                return begun
            return self._ask(question)

    def _start(self) -> dict[str, Any] | None:
        try:
            # A session of its own: Ctrl-C in a terminal is for the program that the user runs.
            self.process = subprocess.Popen(
                [sys.executable, "-I", str(_PROGRAM), self._what],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:  # no descriptors or memory: it passes, and the next question tries again
            return {"error": f"no process for it can be started just now: {error.strerror}"}
        self._close = weakref.finalize(self, _end, self.process)
        return self._ask(self._source)

    def _ask(self, question: Any) -> dict[str, Any] | None:
        """Whatever interrupts this ends the process: half a question or an answer nobody waits for is left in it."""
        number = next(self._numbers)
        try:
            self._write({"number": number, "question": question})
            answer = self._read()
            while answer["number"] < number:  # the interruption was interrupted: that process lives, and is behind
                answer = self._read()
        except (OSError, ValueError, TypeError, LookupError):  # it has ended: a broken pipe, or no whole line
            self._close()
            return None
        except BaseException:
            self._close()
            raise
        return answer

    def _write(self, question: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()
