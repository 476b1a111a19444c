"""What a chat needs from whatever answers, and the conversation it keeps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

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


def system_turns(prompt: Prompt) -> tuple[ChatTurn, ...]:
    """What of a prompt tells a model things before everything else."""
    return tuple(turn for turn in getattr(prompt, "turns", ()) if turn.role == "system")


def form_of(prompt: Prompt) -> ChatPrompt | None:
    """Who speaks when in a conversation, and with which tools, saying nothing of their own; None for other prompts."""
    if not isinstance(prompt, ChatPrompt):
        return None
    return ChatPrompt(tuple(ChatTurn(turn.role, "", "Hello", turn.tools) for turn in prompt.turns))


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


@runtime_checkable
class Reconnecting(Protocol):
    """A backend that can be lost and found again."""

    def reconnect(self, name: str | None, *, patient: bool, on_waiting: Callable[[str], None]) -> None:
        """Use the launch that `name` means; None: the same one, else the only one there is. `patient` waits for one.

        Raises:
            CoordinatorError: there is none, several could be meant, or that is no endpoint.
        """
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """A question and its answer. `num_tokens` is about what they take in a prompt."""

    question: str
    answer: str
    num_tokens: int

    @property
    def turns(self) -> tuple[ChatTurn, ChatTurn]:
        return ChatTurn("user", "", self.question), ChatTurn("assistant", "", self.answer)


class Conversation:
    """The rounds so far, and the system prompt before them if there is one.

    A question joins them together with its answer, so that a failed one leaves no trace. The first `num_left_out`
    rounds are kept, but no model hears of them any more.
    """

    def __init__(self, system: str = "", tools: str = "") -> None:
        self.system = system
        """What the model is told before everything else; empty for nothing."""
        self.tools = tools
        """Which tools it is told of there, as a `ChatTurn` carries them; empty for none."""
        self.rounds: list[Round] = []
        self.num_left_out = 0

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        """Questions and answers in turns, behind the system's."""
        return (*system_turn(self.system, self.tools), *(turn for each in self.rounds for turn in each.turns))

    @property
    def heard(self) -> list[Round]:
        """The rounds that a prompt holds."""
        return self.rounds[self.num_left_out :]

    @property
    def num_tokens_before(self) -> int:
        """About how many tokens a prompt has before its question; the first round brought the system prompt's along."""
        return sum(each.num_tokens for each in self.heard) + (0 if self._has_first else self.num_system_tokens)

    @property
    def num_system_tokens(self) -> int:
        """About how many tokens the system prompt takes."""
        return guessed_tokens(self.system) if self.system else 0

    @property
    def _has_first(self) -> bool:
        return bool(self.rounds) and not self.num_left_out

    def prompt(self, question: str) -> ChatPrompt:
        """What of the conversation is not left out, with a question at its end."""
        heard = (turn for each in self.heard for turn in each.turns)
        return ChatPrompt((*system_turn(self.system, self.tools), *heard, ChatTurn("user", "", question)))

    def add(self, question: str, answer: str, num_tokens: int) -> None:
        """Remember a question and its answer; `num_tokens` are those of its prompt and its answer together."""
        self.rounds.append(Round(question, answer, max(1, num_tokens - self.num_tokens_before)))

    def take_back(self) -> str | None:
        """Forget the last question with its answer; the question, or None if there is none."""
        if not self.rounds:
            return None
        question = self.rounds.pop().question
        self.num_left_out = min(self.num_left_out, len(self.rounds))
        return question

    def clear(self) -> None:
        """Start afresh, with the same system prompt."""
        self.rounds.clear()
        self.num_left_out = 0

    def replace(self, turns: Sequence[ChatTurn]) -> None:
        """Have these turns, as `turns` gives them, in the place of all."""
        has_system = bool(turns) and turns[0].role == "system"
        texts = [turn.content for turn in turns[has_system:]]
        self.system, self.tools = (turns[0].content, turns[0].tools) if has_system else ("", "")
        self.rounds = [
            Round(*pair, guessed_tokens("".join(pair))) for pair in zip(texts[::2], texts[1::2], strict=True)
        ]
        self.num_left_out = 0


def guessed_tokens(text: str) -> int:
    """About how many tokens a text takes, without a tokenizer: three ASCII characters each, or one other."""
    num_ascii = sum(map(str.isascii, text))
    return 1 + num_ascii // 3 + len(text) - num_ascii


def system_turn(text: str, tools: str = "") -> tuple[ChatTurn, ...]:
    """The turn with which a conversation with this system prompt and these tools begins; none where both are empty."""
    return (ChatTurn("system", "", text, tools),) if text or tools else ()
