"""The chat REPL: reads a question, streams the answer, again. Knows backends only through `ChatBackend`."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from coordinator.chat_commands import ChatState, run_command
from coordinator.chat_console import Console, open_console
from coordinator.context_window import Overflow, left_out_line, num_to_leave_out, room_for_answer
from coordinator.conversation import ChatBackend, Conversation, Reconnecting, guessed_tokens
from coordinator.errors import CoordinatorError, GenerationError, PromptTooLong, UsageError
from coordinator.report import report_lines, warnings
from glm.errors import GlmError
from protocol.client import Description, Finished, SamplingParams
from protocol.errors import ProtocolError

INTERRUPTS_TO_LEAVE = 3


def run_chat(
    backend: ChatBackend,
    sampling: SamplingParams,
    *,
    show_stats: bool = False,
    conversation: Conversation | None = None,
    overflow: Overflow = "slide",
    console: Console | None = None,
) -> int:
    """Chat until the input ends or somebody says `stop`.

    `conversation`: how it begins, such as with a system prompt. `overflow`: what is done about a full context.
    Returns the exit code: 1 when a question read from a file or pipe failed, or the model was lost for good; else 0.

    Raises:
        CoordinatorError: the backend is lost, and the input is no terminal.
    """
    console = console or open_console()
    return Chat(backend, sampling, console, show_stats=show_stats, conversation=conversation, overflow=overflow).run()


class Chat:
    """One chat: a backend, a console, and what is remembered between two questions."""

    def __init__(
        self,
        backend: ChatBackend,
        sampling: SamplingParams,
        console: Console,
        *,
        show_stats: bool,
        conversation: Conversation | None,
        overflow: Overflow,
    ) -> None:
        self._backend = backend
        self._console = console
        begun = conversation or Conversation()
        self._state = ChatState(backend.describe(), sampling, show_stats=show_stats, conversation=begun)
        self._overflow = overflow
        self._most_tokens = self._state.description.max_context
        """Of a prompt and its answer; less than the context where an answer was seen to end before that."""
        self._num_unguessed = 0
        """Tokens that questions had beyond what was guessed: what the chat format puts around them."""
        self._has_shown_text = self._is_lost = False
        self._num_failed = 0
        if isinstance(backend, Reconnecting):
            self._state.connect = self._connect

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
        return 1 if self._is_lost and self._state.connect is None else 0

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
        """Stream one answer. A request that fails is said and forgotten; a launch that is lost is looked for."""
        if self._is_lost and not self._found_again(patient=True):
            return
        try:
            try:
                finished = self._stream(question)
            except (GenerationError, GlmError):
                raise
            except CoordinatorError as error:
                self._lose(error)
                if self._has_shown_text or self._state.connect is None or not self._found_again(patient=False):
                    return
                finished = self._stream(question)
        except (GenerationError, GlmError) as error:
            self._fail(error)
            return
        except CoordinatorError as error:
            self._lose(error)
            return
        self._conclude(question, finished)

    def _conclude(self, question: str, finished: Finished) -> None:
        self._console.end_answer()
        self._state.last_stats = finished.stats
        num_tokens = finished.stats.prompt_tokens + finished.stats.new_tokens
        num_asked = finished.stats.prompt_tokens - self._state.conversation.num_tokens_before
        self._num_unguessed = max(self._num_unguessed, num_asked - guessed_tokens(question))
        if finished.text:
            self._state.conversation.add(question, finished.text, num_tokens)
        if finished.finish_reason == "length" and self._state.sampling.max_new_tokens is None:
            self._most_tokens = min(self._most_tokens, num_tokens)
        self._comment(finished)

    def _fail(self, error: Exception) -> None:
        self._num_failed += 1
        self._console.end_answer()
        self._console.note(f"no answer: {error}")
        conversation = self._state.conversation
        if conversation.rounds:
            self._console.note("`clear` starts a new conversation, /save FILE keeps this one")
        if conversation.system:
            self._console.note("there is a system prompt; /system none drops it")

    def _stream(self, question: str) -> Finished:
        """The answer, shown as it comes. With `slide`, the oldest rounds are left out where there is no room for it."""
        self._has_shown_text = False
        self._make_room(question)
        while True:
            try:
                return self._stream_once(question)
            except PromptTooLong:
                if self._overflow == "stop" or not self._state.conversation.heard:
                    raise
                self._leave_out(1)

    def _stream_once(self, question: str) -> Finished:
        finished = None
        prompt = self._state.conversation.prompt(question)
        with self._console.answering(), self._interruptible():
            for event in self._backend.stream(prompt, self._state.sampling):
                if isinstance(event, Finished):
                    finished = event
                else:
                    self._has_shown_text |= bool(event.text)
                    self._console.write(event.text)
        assert finished is not None
        return finished

    def _make_room(self, question: str) -> None:
        """Before a question that would leave no room for its answer, as far as that can be told without a tokenizer."""
        if self._overflow == "stop":
            return
        conversation = self._state.conversation
        most = self._most_tokens - room_for_answer(self._most_tokens, self._state.sampling.max_new_tokens)
        rounds, others = conversation.heard, guessed_tokens(question) + self._num_unguessed
        if conversation.num_left_out or num_to_leave_out(rounds, others, most):
            others += conversation.num_system_tokens  # which the first round would have brought along
        self._leave_out(num_to_leave_out(rounds, others, most))

    def _leave_out(self, number: int) -> None:
        conversation = self._state.conversation
        left_out = conversation.heard[:number]
        if left_out:
            conversation.num_left_out += number
            self._console.note(left_out_line(left_out, self._most_tokens))

    def _comment(self, finished: Finished) -> None:
        """Say why an answer ended, where that is not plain, and what it cost, where that is wanted."""
        note = why_it_ended(finished, self._state, self._overflow)
        if note:
            self._console.note(note)
        lines = (
            report_lines(finished.stats, self._console.width) if self._state.show_stats else warnings(finished.stats)
        )
        if lines:
            self._console.note(*lines)

    def _lose(self, error: CoordinatorError) -> None:
        """The backend is gone, the conversation is not. Who only reads a file or pipe has nobody to ask again."""
        if not self._console.is_interactive:
            raise error
        self._is_lost = True
        self._console.end_answer()
        self._console.note(str(error))
        again = "the next question, or /connect, looks for a launch; " if self._state.connect is not None else ""
        self._console.note(f"the conversation is kept: {again}/save FILE writes it")

    def _found_again(self, *, patient: bool) -> bool:
        """Whether there is somebody to ask again; if not, why, unless that was not waited for."""
        if self._state.connect is None:
            self._console.note("the model is gone; /save FILE writes the conversation, Ctrl-D leaves")
            return False
        try:
            self._connect(None, patient=patient)
        except UsageError as error:
            if patient:
                self._console.note(str(error))
        except KeyboardInterrupt:
            self._console.note("no launch yet; the next question looks again")
        return not self._is_lost

    def _connect(self, name: str | None, *, patient: bool = True) -> None:
        """Raises UsageError: there is no such launch, which is all a command needs to say."""
        assert isinstance(self._backend, Reconnecting)

        def say_waiting(waits_for: str) -> None:
            self._console.note(f"the launch is not ready yet, it waits for {waits_for}")

        try:
            self._backend.reconnect(name, patient=patient, on_waiting=say_waiting)
        except (CoordinatorError, ProtocolError) as error:
            self._is_lost = True
            raise UsageError(str(error)) from None
        self._is_lost = False
        self._now(self._backend.describe())

    def _now(self, description: Description) -> None:
        """Another launch answers from now on, perhaps with another model."""
        before, self._state.description = self._state.description, description
        if self._state.sampling == before.defaults:
            self._state.sampling = description.defaults
        self._most_tokens = description.max_context
        self._console.note(f"connected to {description.model_name} ({description.family}); the conversation goes on")

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


def why_it_ended(finished: Finished, state: ChatState, overflow: Overflow = "stop") -> str:
    """A line about an answer's end, empty where the model ended it."""
    stats, description = finished.stats, state.description
    num_tokens = f"{stats.prompt_tokens} tokens of conversation and {stats.new_tokens} of answer"
    slides = overflow == "slide" and bool(state.conversation.heard)
    remedy = "the next question leaves the oldest ones out" if slides else "`clear` starts afresh"
    if finished.finish_reason == "context_full":
        return (
            f"the model's context is full: {num_tokens} fill its {description.max_context}, so the answer breaks off "
            f"here; {remedy}"
        )
    if finished.finish_reason == "cancelled":
        return "stopped"
    if finished.finish_reason == "length" and state.sampling.max_new_tokens is not None:
        return f"the answer was cut after {stats.new_tokens} tokens, as max_new_tokens says"
    if finished.finish_reason == "length":
        return (
            f"the answer was cut: {num_tokens} are the most that the model's generation_config.json allows together; "
            f"{remedy}, /set max_new_tokens=N allows an answer of N tokens"
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
