"""A chat whose launch ends keeps its conversation, and goes on with the next launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from coordinator.chat import run_chat
from coordinator.chat_console import Entry
from coordinator.conversation import Prompt
from coordinator.errors import ConnectError, StageLost
from protocol.client import Delta, Description, Finished, SamplingParams
from protocol.records import with_changes
from tests.coordinator.fake_backend import DEFAULTS, FakeBackend


class Interactive:
    """A console as of a terminal, with entries that were written beforehand."""

    is_interactive = True
    width = None

    def __init__(self, *entries: str) -> None:
        self._entries = iter(entries)
        self.shown = ""

    def read(self) -> Entry | None:
        text = next(self._entries, None)
        return None if text is None else Entry(text)

    @contextmanager
    def answering(self) -> Iterator[None]:
        yield

    def write(self, text: str) -> None:
        self.shown += text

    def end_answer(self) -> None:
        self.shown += "\n"

    def note(self, *lines: str) -> None:
        self.shown += "".join(f"[{line}]\n" for line in lines)


class MortalBackend(FakeBackend):
    """Dies at the question `die`, before or (`die later`) within its answer; says what `alive` says to a reconnect."""

    def __init__(self, alive: Callable[[bool], bool] = lambda patient: patient) -> None:
        super().__init__()
        self._alive = alive
        self.asked_for: list[tuple[str | None, bool]] = []
        self.is_dead = False

    def describe(self) -> Description:
        return with_changes(super().describe(), model_name=f"model {len(self.asked_for)}")

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
        question = prompt.turns[-1].content
        if self.is_dead or (question.startswith("die") and not self.asked_for):
            self.is_dead = True
            if question == "die later":
                yield Delta(0, "half", (1,))
            raise ConnectError("the launch is gone")
        yield from super().stream(prompt, sampling)

    def reconnect(self, name: str | None, *, patient: bool, on_waiting: Callable[[str], None]) -> None:
        self.asked_for.append((name, patient))
        if not self._alive(patient):
            raise ConnectError("no running launch was found")
        on_waiting("stage 1 to load")
        self.is_dead = False


def questions(backend: FakeBackend) -> list[list[str]]:
    """Of each prompt that got an answer, the texts of its turns."""
    return [[turn.content for turn in prompt.turns] for prompt in backend.prompts]


def test_a_launch_that_is_there_again_gets_the_question_at_once() -> None:
    """Whoever asks need not ask twice; the conversation so far goes along."""
    backend, console = MortalBackend(lambda _: True), Interactive("a", "die", "b")
    assert run_chat(backend, DEFAULTS, console=console) == 0
    assert questions(backend) == [["a"], ["a", "1: a", "die"], ["a", "1: a", "die", "3: die", "b"]]
    assert "[connected to model 1 (chatglm2); the conversation goes on]" in console.shown
    assert "waits for stage 1 to load" in console.shown


def test_the_conversation_outlives_the_launch(tmp_path) -> None:
    """It is kept and can be saved; the next question looks for a launch, for a while, and gets its answer there."""
    path = tmp_path / "kept.txt"
    backend, console = MortalBackend(), Interactive("a", "die", f"/save {path}", "b")
    assert run_chat(backend, DEFAULTS, console=console) == 0
    assert path.read_text() == "user:\na\n\nassistant:\n1: a\n"
    assert "[the launch is gone]\n[the conversation is kept: the next question, or /connect, looks" in console.shown
    assert backend.asked_for == [(None, False), (None, True)]
    assert questions(backend)[-1] == ["a", "1: a", "b"]


def test_half_an_answer_is_not_asked_for_again() -> None:
    """What is on the screen already would come twice: the question is left to whoever asked it."""
    backend, console = MortalBackend(lambda _: True), Interactive("die later", "b")
    run_chat(backend, DEFAULTS, console=console)
    assert questions(backend) == [["b"]]


def test_no_launch_comes_back() -> None:
    """Each question says so, the chat goes on, and leaving is no error."""
    backend, console = MortalBackend(lambda _: False), Interactive("a", "die", "b", "/connect", "/connect 77", "stop")
    assert run_chat(backend, DEFAULTS, console=console) == 0
    assert console.shown.count("no running launch was found") == 3
    assert backend.asked_for == [(None, False), (None, True), (None, True), ("77", True)]


def test_defaults_follow_the_model_but_settings_stay() -> None:
    """What nobody set is as the launch has it that answers."""

    class Other(MortalBackend):
        def describe(self) -> Description:
            described = super().describe()
            changed = with_changes(DEFAULTS, temperature=0.1) if self.asked_for else DEFAULTS
            return with_changes(described, defaults=changed)

    backend = Other(lambda _: True)
    run_chat(backend, DEFAULTS, console=Interactive("die"))
    assert backend.samplings[-1] == with_changes(DEFAULTS, temperature=0.1)
    backend = Other(lambda _: True)
    run_chat(backend, DEFAULTS, console=Interactive("/set seed 7", "die"))
    assert backend.samplings[-1] == with_changes(DEFAULTS, seed=7)


def test_a_model_of_its_own_that_is_lost_leaves_the_conversation(tmp_path) -> None:
    """Nothing answers any more, but what was said can be saved; the exit code says that something failed."""

    class Alone(FakeBackend):
        def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
            if prompt.turns[-1].content == "die":
                raise StageLost("stage 1 ended with signal SIGKILL while serving")
            yield from super().stream(prompt, sampling)

    path = tmp_path / "kept.json"
    console = Interactive("a", "die", "b", "/connect", f"/save {path}")
    assert run_chat(Alone(), DEFAULTS, console=console) == 1
    assert "SIGKILL while serving]\n[the conversation is kept: /save FILE writes it]" in console.shown
    assert "the model is gone" in console.shown and "runs its model itself" in console.shown
    assert path.exists()


def test_a_script_ends_with_the_launch() -> None:
    """Nobody is there to ask again."""
    console = Interactive("die")
    console.is_interactive = False
    with pytest.raises(ConnectError):
        run_chat(MortalBackend(lambda _: True), DEFAULTS, console=console)
