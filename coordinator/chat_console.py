"""Where a chat reads questions and writes answers: a terminal with editing and history, or plain streams."""

import io
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from coordinator.terminal import AnswerWriter, columns, quiet_terminal
from glm.printable import PrintableStream, printable_lines

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'
"""On lines of their own around a text of several lines."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What somebody entered. A quoted text is never a command."""

    text: str
    is_quoted: bool = False


class Console(Protocol):
    """Both directions of a chat."""

    is_interactive: bool

    @property
    def width(self) -> int | None:
        """How many columns notes have; None for as many as they take."""
        ...

    def read(self) -> Entry | None:
        """The next entry, never blank; None when there are no more. Raises KeyboardInterrupt."""
        ...

    def answering(self) -> AbstractContextManager[None]:
        """Around an answer: what is typed meanwhile does not show up in it."""
        ...

    def write(self, text: str) -> None:
        """Show a part of an answer, at once."""
        ...

    def end_answer(self) -> None:
        """The answer is complete, or broken off."""
        ...

    def note(self, *lines: str) -> None:
        """Say something that is not the model's."""
        ...


def open_console() -> Console:
    """A terminal where both stdin and stdout are one, plain streams otherwise."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return TerminalConsole()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    return PlainConsole(sys.stdin, sys.stdout, sys.stderr)


class PlainConsole:
    """One question per line; answers alone on `out`, everything else on `notes`."""

    is_interactive = False

    def __init__(self, questions: TextIO, out: TextIO, notes: TextIO) -> None:
        self._questions = questions
        self._is_beginning = True
        self._out = AnswerWriter(out)
        self._notes = notes

    @property
    def width(self) -> int | None:
        return columns(self._notes)

    def read(self) -> Entry | None:
        for line in self._questions:
            if self._is_beginning:
                line, self._is_beginning = line.removeprefix("\ufeff"), False  # a byte order mark
            if line.strip():
                return as_entry(self._whole(line))
        return None

    def answering(self) -> AbstractContextManager[None]:
        return nullcontext()

    def write(self, text: str) -> None:
        self._out.write(text)

    def end_answer(self) -> None:
        self._out.end()

    def note(self, *lines: str) -> None:
        for line in lines:
            print(printable_lines(line), file=self._notes, flush=True)

    def _whole(self, line: str) -> str:
        """A line with the rest of the block it opens; a block also ends where the input does."""
        text = line
        while is_open_block(text):
            line = self._questions.readline()
            if not line:
                return text + QUOTES
            text += line
        return text


class TerminalConsole:
    """Editing, arrow-key history, several lines. Notes are dim where the terminal can show that."""

    is_interactive = True

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession(
            message="> ",
            multiline=True,
            key_bindings=_key_bindings(),
            history=_history(),
            prompt_continuation="  ",
            enable_open_in_editor=False,
            enable_suspend=True,
        )
        has_color = os.environ.get("TERM", "dumb") != "dumb" and "NO_COLOR" not in os.environ
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if has_color else ("", "")
        self._is_line_begun = False
        self._shown = PrintableStream()

    @property
    def width(self) -> int | None:
        return columns(sys.stdout)

    def read(self) -> Entry | None:
        while True:
            try:
                text = self._session.prompt()
            except EOFError:
                return None
            if text.strip():
                return as_entry(text)

    def answering(self) -> AbstractContextManager[None]:
        return quiet_terminal()

    def write(self, text: str) -> None:
        self._put(self._shown.push(text))

    def end_answer(self) -> None:
        self._put(self._shown.flush())
        if self._is_line_begun:
            self._put("\n")

    def note(self, *lines: str) -> None:
        self.end_answer()
        for line in lines:
            print(f"{self._dim}{printable_lines(line)}{self._plain}", flush=True)

    def _put(self, text: str) -> None:
        if text:
            self._is_line_begun = not text.endswith("\n")
            sys.stdout.write(text)
            sys.stdout.flush()


def is_open_block(text: str) -> bool:
    """Whether a text begins with quotes that are not closed yet."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def as_entry(text: str) -> Entry:
    """Take the quotes, and the line breaks beside them, off a block; a line end off a line."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES) or is_open_block(text):
        return Entry(text.rstrip("\r\n"))
    inner = stripped[len(QUOTES) : -len(QUOTES)]
    return Entry(inner.removeprefix("\n").removesuffix("\n"), is_quoted=True)


def history_file() -> Path:
    """Where questions are remembered: under the user's state directory."""
    base = os.environ.get("XDG_STATE_HOME", "")
    state = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return state / "glmpipe" / "chat_history"


def _history() -> "History":
    """Readable by its owner only; kept in memory alone where nothing can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        path = history_file()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(str(path))


def _key_bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _submit(event: "KeyPressEvent") -> None:
        buffer = event.current_buffer
        if is_open_block(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: "KeyPressEvent") -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
