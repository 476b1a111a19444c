"""A chat whose conversation fills the context: what is left out, and that it is said."""

import io
from collections.abc import Iterator

import pytest

from coordinator.chat import run_chat
from coordinator.chat_console import PlainConsole
from coordinator.context_window import num_to_leave_out, room_for_answer
from coordinator.conversation import Conversation, Prompt, Round
from coordinator.errors import PromptTooLong
from protocol.client import ChatPrompt, Delta, Description, Finished, FinishReason, GenerationStats, SamplingParams
from protocol.records import with_changes
from tests.coordinator.fake_backend import DEFAULTS, STATS, FakeBackend


class CountingBackend(FakeBackend):
    """A token for each character, a context of 100 tokens, answers of 10 tokens that end where the context does."""

    def __init__(self, max_length: int = 100) -> None:
        super().__init__()
        self._max_length = max_length

    def describe(self) -> Description:
        return with_changes(super().describe(), max_context=100)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
        assert sampling is not None
        self.prompts.append(prompt)
        num_prompt = sum(len(turn.content) for turn in prompt.turns)
        if num_prompt >= 100:
            raise PromptTooLong(f"the conversation has {num_prompt} tokens, the model's context holds 100")
        num_new = max(1, min(10, self._max_length - num_prompt))
        reason: FinishReason = "stop" if num_new == 10 else "context_full" if self._max_length == 100 else "length"
        yield Delta(0, "b" * num_new, (1,) * num_new)
        stats: GenerationStats = with_changes(STATS, prompt_tokens=num_prompt, new_tokens=num_new)
        yield Finished(0, reason, "b" * num_new, (1,) * num_new, stats)


def chat(text: str, backend: CountingBackend, **settings: str) -> tuple[str, list[list[str]]]:
    """The notes, and of each prompt its turns, by their first character and length."""
    notes = io.StringIO()
    run_chat(backend, DEFAULTS, console=PlainConsole(io.StringIO(text), io.StringIO(), notes), **settings)
    return notes.getvalue(), [[f"{t.content[0]}{len(t.content)}" for t in prompt.turns] for prompt in backend.prompts]


QUESTIONS = "".join(f"{digit * 20}\n" for digit in "一二三四五")


def test_the_oldest_rounds_are_left_out_and_that_is_said(tmp_path) -> None:
    """Rounds of 30 tokens, a quarter of 100 for the answer: a third question leaves the first one out. All is saved."""
    notes, prompts = chat(f"{QUESTIONS}/save {tmp_path}/all.json\n", CountingBackend())
    assert prompts[1] == ["一20", "b10", "二20"]
    assert prompts[2] == ["二20", "b10", "三20"]
    assert prompts[4] == ["四20", "b10", "五20"]
    assert notes.count("the context of 100 tokens is full: the oldest question and its answer (about 30 tokens)") == 3
    assert "wrote 10 messages" in notes


def test_the_system_prompt_is_never_left_out() -> None:
    """It comes first in every prompt."""
    _, prompts = chat(QUESTIONS, CountingBackend(), conversation=Conversation("说" * 30))
    assert [prompt[0] for prompt in prompts] == ["说30"] * 5
    assert prompts[-1] == ["说30", "五20"]


def test_stop_leaves_nothing_out() -> None:
    """What is too long is refused, with the remedy."""
    notes, prompts = chat(QUESTIONS, CountingBackend(), overflow="stop")
    assert prompts[3] == ["一20", "b10", "二20", "b10", "三20", "b10", "四20"]
    assert "left out" not in notes
    assert notes.count("no answer: the conversation has 110 tokens") == 2 and "`clear` starts a new" in notes


def test_a_guess_that_was_too_low_is_made_good() -> None:
    """ASCII that takes a token a character is guessed at a third: refused, the question is asked with fewer rounds."""
    notes, prompts = chat(f"{'一' * 20}\n{'2' * 85}\n", CountingBackend())
    assert prompts == [["一20"], ["一20", "b10", "285"], ["285"]]
    assert "are left out" in notes and "no answer" not in notes


def test_a_question_that_is_too_long_by_itself_is_refused() -> None:
    """Nothing is left to leave out; the conversation stays as it was."""
    notes, prompts = chat(f"{'1' * 150}\n{'2' * 20}\n", CountingBackend())
    assert "no answer: the conversation has 150 tokens" in notes
    assert prompts[-1] == ["220"]


def test_a_published_length_is_learned() -> None:
    """A model that ends answers before its context does (ChatGLM-6B's published length): the next question slides."""
    notes, prompts = chat(QUESTIONS, CountingBackend(max_length=55))
    assert "generation_config.json allows together" in notes and "leaves the oldest ones out" in notes
    assert prompts[1] == ["一20", "b10", "二20"]
    assert prompts[2] == ["三20"]


def test_again_and_load_after_rounds_were_left_out(tmp_path) -> None:
    """What is taken back may be the only round that was heard; a loaded conversation counts by guess."""
    _, prompts = chat(f"{QUESTIONS}/again\n", CountingBackend())
    assert prompts[-1] == ["四20", "b10", "五20"]
    path = tmp_path / "long.txt"
    path.write_text("".join(f"user:\n{'你' * 30}\n\nassistant:\n{'好' * 30}\n\n" for _ in range(3)))
    notes, prompts = chat(f"/load {path}\nx\n", CountingBackend())
    assert prompts == [["你30", "好31", "x1"]]
    assert "the 2 oldest questions and their answers" in notes


@pytest.mark.parametrize(("most", "number"), [(100, 0), (60, 0), (59, 1), (40, 1), (39, 2), (10, 3), (5, 3)])
def test_how_many_must_go(most: int, number: int) -> None:
    """As few as possible, from the oldest on; all where even that is not enough."""
    rounds = [Round("q", "a", num_tokens) for num_tokens in (20, 10, 20)]
    assert num_to_leave_out(rounds, 10, most) == number


def test_room_for_an_answer() -> None:
    """A quarter of the context, or less if the answer may not be as long."""
    assert (room_for_answer(1000, None), room_for_answer(1000, 50), room_for_answer(1000, 900)) == (250, 50, 250)


def test_what_a_chat_format_adds_is_learned() -> None:
    """Ten tokens around each question: once they were seen, the next answers have their quarter of the context."""

    class Formatted(CountingBackend):
        def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
            assert isinstance(prompt, ChatPrompt)
            turns = [
                with_changes(turn, content=turn.content + "-" * 10 * (turn.role == "user")) for turn in prompt.turns
            ]
            yield from super().stream(ChatPrompt(tuple(turns)), sampling)

    backend = Formatted()
    notes, _ = chat(QUESTIONS, backend)
    assert all(sum(len(turn.content) for turn in prompt.turns) <= 75 for prompt in backend.prompts)
    assert "breaks off" not in notes and "left out" in notes


def test_tokens_of_a_round_are_what_it_added() -> None:
    """The whole less the rounds before it that were heard."""
    conversation = Conversation()
    for total in (30, 70, 120):
        conversation.add("q", "a", total)
    assert [each.num_tokens for each in conversation.rounds] == [30, 40, 50]
    conversation.num_left_out = 1
    conversation.add("q", "a", 100)
    assert conversation.rounds[-1].num_tokens == 10
