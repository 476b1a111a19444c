"""stdin, stdout and stderr as both programs find them: always there, and a full disk behind one of them is no crash."""

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn, TextIO

from glm.printable import printable_lines

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141


class OutputError(Exception):
    """stdout was closed, or what it goes to takes no more."""


class _Output(io.FileIO):
    """stdout, whose failures are told as its own. That nobody reads any more (`| head`) stays a BrokenPipeError."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"stdout cannot be written: {error.strerror}; what was to be said there is lost"
            ) from None


class _Notes(io.FileIO):
    """stderr. What cannot be said there is lost, and nothing else with it; whoever wants to know is told by a count."""

    num_lost = 0

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            self.num_lost += 1
            return memoryview(data).nbytes


def num_lost_writes(stream: object) -> int:
    """How often something could not be written to a stream that says nothing of it."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.num_lost if isinstance(raw, _Notes) else 0


def open_standard_streams() -> None:
    """Put streams in place of Python's own, and of closed ones, so that no file or socket gets the number of these.

    A closed stdin is at its end, a closed stderr takes everything, a closed stdout is an error once it is written to.
    """
    for number, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - a descriptor, for good
    sys.stdout = _text(sys.stdout, _Output(1, "w", closefd=False))
    sys.stderr = _text(sys.stderr, _Notes(2, "w", closefd=False), is_notes=True)


def _text(before: TextIO | None, raw: io.FileIO, *, is_notes: bool = False) -> TextIO:
    """A character that the encoding lacks is replaced, which ends no answer."""
    encoding = "utf-8" if before is None else before.encoding
    is_direct = is_notes or raw.isatty()
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="replace", line_buffering=is_direct)


def run_program(name: str, main: Callable[[], int]) -> NoReturn:
    """Run `main` and end the process with its exit code, or with that of what went wrong with stdout.

    Without the interpreter's own end: for that, Python takes its signal handlers away, and everything is closed by now.
    """
    try:
        try:
            code = main()
        except SystemExit as ended:
            code = _exit_code(ended)
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OutputError as error:
        code = EXIT_FAILED
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    except Exception:  # of our own, with whatever its text may quote
        code = EXIT_FAILED
        print(printable_lines(traceback.format_exc()), end="", file=sys.stderr, flush=True)
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def _exit_code(ended: SystemExit) -> int:
    if isinstance(ended.code, str):
        print(ended.code, file=sys.stderr)
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def forget_stdout() -> None:
    """Keep the interpreter from complaining about it when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
