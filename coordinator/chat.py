"""The chat REPL: reads a question, streams the answer, again. Knows backends only through `ChatBackend`."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from coordinator.chat_commands import ChatState, run_command
from coordinator.chat_console import Console, open_console
from coordinator.conversation import ChatBackend
from coordinator.errors import GenerationError
from coordinator.report import report_lines, warnings
from glm.errors import GlmError
from protocol.client import Finished, SamplingParams

INTERRUPTS_TO_LEAVE = 3


def run_chat(
    backend: ChatBackend, sampling: SamplingParams, *, show_stats: bool = False, console: Console | None = None
) -> int:
    """Chat until the input ends or somebody says `stop`.

    Returns the exit code: 1 when a question read from a file or pipe failed, else 0, however somebody left.

    Raises:
        CoordinatorError: the backend is lost; no further answer is possible.
    """
    return Chat(backend, sampling, console or open_console(), show_stats=show_stats).run()


class Chat:
    """One chat: a backend, a console, and what is remembered between two questions."""

    def __init__(self, backend: ChatBackend, sampling: SamplingParams, console: Console, *, show_stats: bool) -> None:
        self._backend = backend
        self._console = console
        self._state = ChatState(backend.describe(), sampling, show_stats=show_stats)
        self._num_failed = 0

    def run(self) -> int:
        """See `run_chat`."""
        if not self._console.is_interactive:
            self._converse()
            return 1 if self._num_failed else 0
        self._greet()
        try:
            self._converse()
        except KeyboardInterrupt:  # somebody insisted, which is a way to leave a conversation like others
            self._console.end_answer()
        return 0

    def _converse(self) -> None:
        while not self._state.is_over:
            try:
                entry = self._console.read()
            except KeyboardInterrupt:
                if not self._console.is_interactive:
                    raise
                self._console.note("Ctrl-D or stop leaves the chat")
                continue
            if entry is None:
                break
            question = None if run_command(self._state, self._console, entry) else entry.text
            question, self._state.question = question or self._state.question, None
            if question is not None:
                self._ask(question)

    def _greet(self) -> None:
        about = self._state.description
        self._console.note(
            f"{about.model_name} ({about.family}), a context of {about.max_context} tokens. "
            "/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."
        )

    def _ask(self, question: str) -> None:
        """Stream one answer. A request that fails is said and forgotten."""
        try:
            finished = self._stream(question)
        except (GenerationError, GlmError) as error:
            self._num_failed += 1
            self._console.end_answer()
            self._console.note(f"no answer: {error}")
            if self._state.conversation.turns:
                self._console.note("`clear` starts a new conversation")
            return
        self._console.end_answer()
        self._state.last_stats = finished.stats
        if finished.text:
            self._state.conversation.add(question, finished.text)
        self._comment(finished)

    def _stream(self, question: str) -> Finished:
        finished = None
        prompt = self._state.conversation.prompt(question)
        with self._interruptible():
            for event in self._backend.stream(prompt, self._state.sampling):
                if isinstance(event, Finished):
                    finished = event
                else:
                    self._console.write(event.text)
        assert finished is not None
        return finished

    def _comment(self, finished: Finished) -> None:
        """Say why an answer ended, where that is not plain, and what it cost, where that is wanted."""
        note = why_it_ended(finished, self._state)
        if note:
            self._console.note(note)
        lines = report_lines(finished.stats) if self._state.show_stats else warnings(finished.stats)
        if lines:
            self._console.note(*lines)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """On a terminal Ctrl-C asks the backend to stop; who insists leaves the chat. Elsewhere it ends the program."""
        if not self._console.is_interactive or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, _stopper(self._backend.cancel))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def why_it_ended(finished: Finished, state: ChatState) -> str:
    """A line about an answer's end, empty where the model ended it."""
    stats, description = finished.stats, state.description
    num_tokens = f"{stats.prompt_tokens} tokens of conversation and {stats.new_tokens} of answer"
    if finished.finish_reason == "context_full":
        return (
            f"the model's context is full: {num_tokens} fill its {description.max_context}, so the answer breaks off "
            "here. `clear` starts afresh"
        )
    if finished.finish_reason == "cancelled":
        return "stopped"
    if finished.finish_reason == "length" and state.sampling.max_new_tokens is not None:
        return f"the answer was cut after {stats.new_tokens} tokens, as max_new_tokens says"
    if finished.finish_reason == "length":
        return (
            f"the answer was cut: {num_tokens} are the most this model was published to hold together. "
            "`clear` starts afresh, /set max_new_tokens=N allows an answer of N tokens"
        )
    return "" if finished.text else "the model answered nothing"


def _stopper(cancel: Callable[[], None]) -> Callable[[int, FrameType | None], None]:
    """A handler for SIGINT. It writes to the descriptor itself: the program may be inside a print."""
    count = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        cancel()
        if count == INTERRUPTS_TO_LEAVE - 1:
            os.write(2, b"\nstopping after the step under way; Ctrl-C once more leaves the chat\n")
        if count >= INTERRUPTS_TO_LEAVE:
            raise KeyboardInterrupt

    return handle
