"""What a chat needs from whatever answers, and the conversation it keeps."""

import json
from collections.abc import Iterator
from typing import Literal, Protocol

from protocol.client import ChatPrompt, ChatTurn, Delta, Description, Finished, SamplingParams, TextPrompt, TokenPrompt

Prompt = ChatPrompt | TextPrompt | TokenPrompt
Wanted = Literal["token ids", "text", "chat"]
WANTED: tuple[Wanted, ...] = ("token ids", "text", "chat")
"""What a model can be asked with; each takes more of its files than the one before: none, tokenizer, chat format."""


def wanted_of(prompt: Prompt) -> Wanted:
    """What this prompt takes."""
    if isinstance(prompt, ChatPrompt):
        return "chat"
    return "text" if isinstance(prompt, TextPrompt) else "token ids"


class ChatBackend(Protocol):
    """What answers: a model launched by this program, or a running launch. Used from one thread, `cancel` aside."""

    def describe(self) -> Description:
        """What runs there: model, context, plan, sampling defaults."""
        ...

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
        """Any number of Delta, then one Finished. Closing the iterator stops the answer.

        Raises:
            GenerationError: this request failed, others may go well. Any other CoordinatorError: the backend is lost.
        """
        ...

    def cancel(self) -> None:
        """Stop the answer being streamed; Finished (`cancelled`) follows. Safe in signal handlers and other threads."""
        ...


class Conversation:
    """The turns so far. A question joins them together with its answer, so that a failed one leaves no trace."""

    def __init__(self) -> None:
        self._turns: list[ChatTurn] = []

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        return tuple(self._turns)

    def prompt(self, question: str) -> ChatPrompt:
        """The conversation with a question at its end."""
        return ChatPrompt((*self._turns, ChatTurn("user", "", question)))

    def add(self, question: str, answer: str) -> None:
        """Remember a question and its answer."""
        self._turns += [ChatTurn("user", "", question), ChatTurn("assistant", "", answer)]

    def take_back(self) -> str | None:
        """Forget the last question with its answer; the question, or None if there is none."""
        if not self._turns:
            return None
        question, _ = self._turns[-2:]
        del self._turns[-2:]
        return question.content

    def clear(self) -> None:
        """Start afresh."""
        self._turns.clear()


def as_json(turns: tuple[ChatTurn, ...]) -> str:
    """The turns as `[{"role": ..., "content": ...}, ...]`, as `ChatModel.chat` takes for a history."""
    plain = [{"role": turn.role, "content": turn.content} for turn in turns]
    return json.dumps(plain, ensure_ascii=False, indent=2) + "\n"


def as_text(turns: tuple[ChatTurn, ...]) -> str:
    """The turns for reading."""
    return "\n".join(f"{turn.role}:\n{turn.content}\n" for turn in turns)
