"""stdin, stdout and stderr as both programs find them: always there, and a full disk behind one of them is no crash."""

import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn, TextIO

from glm.printable import printable_lines

if TYPE_CHECKING:
    pass

EXIT_FAILED = 1
EXIT_BROKEN_PIPE = 141


class OutputError(Exception):
    """stdout was closed, or what it goes to takes no more."""


class _Output(io.TextIOWrapper):
    """stdout, whose failures are told as its own. That nobody reads any more (`| head`) stays a BrokenPipeError."""

    def write(self, text: str, /) -> int:
        with _told():
            return super().write(text)

    def flush(self) -> None:
        with _told():
            super().flush()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout cannot be written: {error.strerror}; what was to be said there is lost") from None


class _Notes(io.TextIOWrapper):
    """stderr. What cannot be said there is lost, and nothing else with it; whoever wants to know is told by a count.

    Without a buffer, and caught above what writes: an exception out of a signal's handler must not come between.
    """

    num_lost = 0

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            raise
        except OSError:
            self.num_lost += 1
            return len(text)


def num_lost_writes(stream: object) -> int:
    """How often something could not be written to a stream that says nothing of it."""
    return stream.num_lost if isinstance(stream, _Notes) else 0


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
    out, notes = io.FileIO(1, "w", closefd=False), io.FileIO(2, "w", closefd=False)
    # A character that the encoding lacks is replaced, which ends no answer.
    before = _encoding(sys.stdout), _encoding(sys.stderr)
    sys.stdout = _Output(io.BufferedWriter(out), before[0], errors="replace", line_buffering=out.isatty())
    sys.stderr = _Notes(notes, before[1], errors="replace", write_through=True)


def _encoding(stream: TextIO | None) -> str:
    return "utf-8" if stream is None else stream.encoding


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
