"""What a model brings along and others have written, run in a process that has seconds, some memory and no files."""

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, Literal

_PROGRAM = Path(__file__).with_name("confined_program.py")


class Confined:
    """`confined_program.py`, begun with `source` and begun again where it was lost."""

    def __init__(self, what: Literal["template", "words"], source: str) -> None:
        self._what = what
        self._source = source
        self.begun = self._start()
        """What it said to the source: nothing, `error` and a text, or None where it was lost."""

    def ask(self, question: Any) -> dict[str, Any] | None:
        """Its answer, which may be an `error`; None: it took more time or memory than it has, and was lost."""
        if self.process.poll() is not None:
            self._start()
        return self._ask(question)

    def _start(self) -> dict[str, Any] | None:
        # A session of its own: Ctrl-C in a terminal is for the program that the user runs.
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM), self._what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._close = weakref.finalize(self, _end, self.process)
        return self._ask(self._source)

    def _ask(self, question: Any) -> dict[str, Any] | None:
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            answer: dict[str, Any] = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it has ended: a broken pipe, or no whole line
            self._close()
            return None
        return answer


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()
