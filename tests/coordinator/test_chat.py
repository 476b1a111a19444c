"""The chat REPL with a scripted backend: through plain streams, as a pipe would, and on a real terminal."""

import io
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pexpect
import pytest

from coordinator.chat import run_chat
from coordinator.chat_console import PlainConsole, history_file, is_open_block
from coordinator.conversation import Conversation
from protocol.client import ChatTurn
from tests.coordinator.fake_backend import DEFAULTS, FakeBackend

ROOT = Path(__file__).resolve().parents[2]


class Piped:
    """A chat whose input is a text: what came out, what was noted, the exit code."""

    def __init__(self, text: str, backend: FakeBackend | None = None, **settings: Any) -> None:
        self.backend = backend or FakeBackend()
        out, notes = io.StringIO(), io.StringIO()
        console = PlainConsole(io.StringIO(text), out, notes)
        self.code = run_chat(self.backend, DEFAULTS, console=console, **settings)
        self.out, self.notes = out.getvalue(), notes.getvalue()


def test_a_pipe_gets_answers_and_nothing_else() -> None:
    """One question per line, one answer each, no prompts, no greeting; blank lines are no questions."""
    chat = Piped("你好\n\nhello 👋\n")
    assert chat.out == "1: 你好\n3: hello 👋\n"
    assert (chat.notes, chat.code) == ("", 0)


def test_a_broken_model_is_told_once_with_and_without_a_report() -> None:
    """Scores that were no numbers are worth a line after the answer, whether statistics are shown or not."""
    for show_stats in (False, True):
        chat = Piped("fine\nbroken\n", show_stats=show_stats)
        assert chat.notes.count("warning: the scores of 2 of 21 tokens were not finite") == 1


def test_the_conversation_grows_with_each_answer() -> None:
    """The backend gets all turns before a question."""
    chat = Piped("a\nb\n")
    assert chat.backend.prompts[-1].turns == (
        ChatTurn("user", "", "a"),
        ChatTurn("assistant", "", "1: a"),
        ChatTurn("user", "", "b"),
    )


def test_clear_forgets_and_stop_leaves() -> None:
    """As words of their own and with a slash."""
    assert Piped("a\nclear\nb\nstop\nc\n").out == "1: a\n1: b\n"
    assert Piped("a\n/clear\nb\n/stop\nc\n").out == "1: a\n1: b\n"
    assert Piped("please stop\n").out == "1: please stop\n"


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", "/bye", "/stop", " exit ", "／exit"])
def test_words_that_leave(word: str) -> None:
    """As other chats have them, with the wide slash of a Chinese keyboard, too."""
    chat = Piped(f"a\n{word}\nb\n")
    assert (chat.out, chat.code) == ("1: a\n", 0)
    assert Piped("how do I exit vim?\n").out == "1: how do I exit vim?\n"


def test_again_and_edit_take_the_last_turn_back() -> None:
    """The question is asked again, or another one, behind the turns before it; without a question there is nothing."""
    chat = Piped("a\nb\n/again\n/edit c\n")
    assert [[turn.content for turn in prompt.turns] for prompt in chat.backend.prompts] == [
        ["a"],
        ["a", "1: a", "b"],
        ["a", "1: a", "b"],
        ["a", "1: a", "c"],
    ]
    assert "no question yet" in Piped("/again\n").notes
    assert "no question yet" in Piped("/edit a\n").notes
    assert "/edit and the question" in Piped("a\n/edit\n").notes


def test_a_block_is_one_question() -> None:
    """Between quotes line breaks and command words are text; the end of the input closes a block."""
    chat = Piped('"""\nline one\n\nstop\n"""\n"""stop"""\n"""\nlast\n')
    questions = [prompt.turns[-1].content for prompt in chat.backend.prompts]
    assert questions == ["line one\n\nstop", "stop", "last"]


@pytest.mark.parametrize(
    ("text", "is_open"),
    [("a", False), ('"""', True), ('"""a', True), ('"""a"""', False), ('""""', True), ('""""""', False)],
)
def test_open_blocks(text: str, is_open: bool) -> None:
    """A block is open until three more quotes end it."""
    assert is_open_block(text) is is_open


def test_settings_apply_to_the_next_answer() -> None:
    """Several at once, of every type, and back to the defaults."""
    line = '/set temperature=0.3 top_k=5, seed=7 stop=["END", "\\n"] max_new_tokens=9 ignore_eos=yes'
    chat = Piped(f"{line}\na\n/set stop=none\nb\n/set default\nc\n")
    first, second, third = chat.backend.samplings
    assert first is not None and second is not None
    assert (first.temperature, first.top_k, first.seed, first.top_p) == (0.3, 5, 7, 0.8)
    assert (first.stop, first.max_new_tokens, first.ignore_eos) == (("END", "\n"), 9, True)
    assert (second.stop, second.seed) == ((), 7)
    assert third == DEFAULTS
    assert 'temperature=0.3, top_k=5, seed=7, stop=["END", "\\n"], max_new_tokens=9, ignore_eos=true' in chat.notes


def test_settings_without_an_equals_sign() -> None:
    """A name, a space, a value; names as the command line spells them, too; a name alone is shown."""
    chat = Piped('/set temperature 0.3 top-k 5 stop "a b"\n/set Seed\n/set seed, top_k\n/set seed = 7\na\n')
    (sampling,) = chat.backend.samplings
    assert sampling is not None
    assert (sampling.temperature, sampling.top_k, sampling.stop, sampling.seed) == (0.3, 5, ("a b",), 7)
    shown = [line.split("   ")[0] for line in chat.notes.splitlines()]
    assert shown == ['temperature=0.3, top_k=5, stop=["a b"]', "seed=none", "seed=none", "top_k=5", "seed=7"]


def test_settings_are_listed_with_what_is_allowed() -> None:
    """Each has its value and its rule; setting a value again changes nothing."""
    chat = Piped("/set\n/set temperature=0.8\n")
    assert re.search(r"temperature=0\.8 +a number from 0 \(greedy\) to 100\n", chat.notes)
    assert re.search(r"stop=none +at most", chat.notes)
    assert chat.notes.endswith("nothing changed\n")


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("temperature=-1", "temperature is -1.0, it must be a number from 0 (greedy) to 100"),
        ("temperature=warm", "temperature is 'warm', it must be a number"),
        ("top_p=0 min_p=2", "min_p is 2.0"),
        ("temprature=1", "there is no setting temprature (did you mean temperature?); there are temperature, top_k"),
        ("temprature", "'temprature' sets nothing (did you mean temperature?); write /set temperature 0.3"),
        ("temperature 1 top_k", "'top_k' sets nothing; write /set temperature 0.3"),
        ("temperature -1", "temperature is -1.0"),
        ("ignore_eos=true", "ignore_eos needs max_new_tokens"),
        ("stop=[x]", 'write stop="END"'),
        ('stop=""', "stop is ('',), it must be at most 64 texts"),
        ("greedy=none", "greedy is None, it must be true or false"),
        ("seed=1.5", "seed is '1.5', it must be a whole number"),
    ],
)
def test_impossible_settings_say_what_is_allowed(setting: str, complaint: str) -> None:
    """Nothing changes, and the chat goes on."""
    chat = Piped(f"/set {setting}\na\n")
    assert complaint in chat.notes
    assert chat.backend.samplings == [DEFAULTS]


def test_a_setting_without_effect_is_mentioned() -> None:
    """Greedy choice ignores the temperature, and says so."""
    assert "greedy is on, so temperature, top_p has no effect" in Piped("/set greedy=true\n").notes


def test_help_plan_and_stats() -> None:
    """Every command is listed; the plan's lines and the last answer's report are shown on demand."""
    chat = Piped("/stats\n/help\n/plan\na\n/stats\n")
    for word in ("there is no answer yet", "clear, /clear", "/save FILE", "Ctrl-C", "layers 1-6 -> fp32 -> cpu"):
        assert word in chat.notes
    assert re.search(r"prompt +50 tokens +0\.500 s", chat.notes)
    assert chat.out == "1: a\n"


def test_stats_after_each_answer() -> None:
    """By option, and switched inside the chat."""
    assert Piped("a\nb\n", show_stats=True).notes.count("KV tokens") == 2
    assert Piped("a\n/stats on\nb\n/stats off\nc\n").notes.count("KV tokens") == 1


def test_unknown_commands_are_not_questions() -> None:
    """A typing mistake does not reach the model; a path does."""
    chat = Piped("/quti\n/usr/bin is what?\n /quti\n/clear all\n/stats x\n")
    assert chat.out == "1: /usr/bin is what?\n3:  /quti\n"
    assert "/quti is no command (did you mean /quit?); /help" in chat.notes
    assert "/xyzzy is no command; /help" in Piped("/xyzzy\n").notes
    assert "/clear takes nothing behind it" in chat.notes
    assert "/stats on" in chat.notes


def test_save(tmp_path: Path) -> None:
    """As text and as JSON; again by the same chat, but never over somebody else's file."""
    text, data, other = tmp_path / "a.txt", tmp_path / "a.json", tmp_path / "other"
    other.write_text("mine")
    chat = Piped(f"你好\n/save {text}\n/save {data}\nb\n/save {data}\n/save {other}\n/save\n/save {tmp_path}/no/x\n")
    assert text.read_text() == "user:\n你好\n\nassistant:\n1: 你好\n"
    assert [turn["role"] for turn in json.loads(data.read_text())] == ["user", "assistant"] * 2
    assert other.read_text() == "mine"
    for complaint in ("choose another name", "write /save FILE", "No such file"):
        assert complaint in chat.notes


@pytest.mark.parametrize("name", ["chat.json", "chat.txt"])
def test_a_saved_chat_is_loaded_again(name: str, tmp_path: Path) -> None:
    """In both forms, system prompt and line breaks included; it replaces what was said, and may be saved again."""
    path = tmp_path / name
    backend = FakeBackend({"b": "user:\n\\assistant:\nend\n"})
    first = Piped(f'/system 你是图书管理员。\n"""\nuser:\n\nassistant:\n"""\nb\n/save {path}\n', backend)
    second = Piped(f"x\n/load {path}\n/system\nc\n/save {path}\n")
    assert "read 5 messages" in second.notes and "in place of the 1 question of" in second.notes
    assert second.backend.prompts[-1].turns == (
        ChatTurn("system", "", "你是图书管理员。"),
        ChatTurn("user", "", "user:\n\nassistant:"),
        ChatTurn("assistant", "", "2: user:\n\nassistant:"),
        ChatTurn("user", "", "b"),
        ChatTurn("assistant", "", "user:\n\\assistant:\nend\n"),
        ChatTurn("user", "", "c"),
    )
    assert "你是图书管理员。" in second.notes
    assert f"wrote 7 messages to {path}" in second.notes
    assert first.code == second.code == 0


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'[{"role": "user"}]', "message 1 is not {"),
        (b'[{"role": "user", "content": "a"}]', "ends with a question that has no answer"),
        (b'[{"role": "assistant", "content": "a"}]', "message 1 is the assistant's, where the user's is due"),
        (b'{"role": "user"}', "must hold a list"),
        (b"[[[", "is not readable as JSON"),
        (b"hello", "does not begin with user:"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
    ],
)
def test_what_cannot_be_loaded(data: bytes, complaint: str, tmp_path: Path) -> None:
    """The chat goes on with what it had."""
    path = tmp_path / "file"
    path.write_bytes(data)
    chat = Piped(f"a\n/load {path}\n/load {tmp_path}\n/load {tmp_path}/none\n/load\nb\n")
    assert f"{path}" in chat.notes and complaint in chat.notes
    for other in ("is not a file", "cannot be read: No such file", "write /load FILE"):
        assert other in chat.notes
    assert len(chat.backend.prompts[-1].turns) == 3


def test_a_text_that_an_editor_has_rewritten_is_loaded(tmp_path: Path) -> None:
    """With a byte order mark and the line ends of Windows."""
    path = tmp_path / "file.txt"
    path.write_bytes("\ufeffuser:\r\n你好\r\n\r\nassistant:\r\nhello\r\n".encode())
    chat = Piped(f"/load {path}\nb\n")
    assert [turn.content for turn in chat.backend.prompts[0].turns] == ["你好", "hello", "b"]


def test_the_system_prompt(tmp_path: Path) -> None:
    """By option or command, from a file (without a byte order mark), kept by `clear`, dropped by `none`."""
    path = tmp_path / "system.txt"
    path.write_bytes("\ufeff你是诗人。\r\nBe brief.\n".encode())
    chat = Piped(f"/system\n/system @{path}\na\nclear\nb\n/system @@home\nc\n/system none\nclear\nd\n")
    systems = [[turn.content for turn in prompt.turns if turn.role == "system"] for prompt in chat.backend.prompts]
    assert systems == [["你是诗人。\nBe brief."], ["你是诗人。\nBe brief."], ["@home"], []]
    assert "there is no system prompt; /system TEXT" in chat.notes
    assert f"{tmp_path}/none cannot be read: No such file" in Piped(f"/system @{tmp_path}/none\n").notes
    assert Piped("a\n", conversation=Conversation("be brief")).backend.prompts[0].turns[0] == ChatTurn(
        "system", "", "be brief"
    )


def test_a_system_prompt_that_the_model_refuses_can_be_dropped() -> None:
    """The failed question says how."""
    assert "/system none drops it" in Piped("/system x\ntoo long\n").notes
    assert "/system" not in Piped("too long\n").notes


def test_a_full_context_is_said_plainly() -> None:
    """What happened, how many tokens, what happens next, or what to do."""
    for overflow, remedy in (("slide", "the next question leaves the oldest"), ("stop", "`clear` starts afresh")):
        chat = Piped("context_full\n", overflow=overflow)
        assert chat.out == "1: context_full\n"
        for word in ("context is full", "50 tokens of conversation and 21 of answer", "its 1000", remedy):
            assert word in chat.notes


def test_other_ends_are_said() -> None:
    """Length limits and empty answers are explained, an ordinary end is not."""
    assert "generation_config.json allows together" in Piped("length\n").notes
    assert "max_new_tokens says" in Piped("/set max_new_tokens=21\nlength\n").notes
    assert "stopped" in Piped("cancelled\n").notes
    assert Piped("stop_string\n").notes == ""
    assert "answered nothing" in Piped("x\n", FakeBackend({"x": ""})).notes


def test_a_failed_question_leaves_no_trace() -> None:
    """The error is said, the chat goes on without that question, and a script sees the failure."""
    chat = Piped("a\ntoo long\nb\n")
    assert chat.out == "1: a\n\n3: b\n"
    assert "no answer: the conversation has 101 tokens" in chat.notes
    assert "`clear` starts a new conversation" in chat.notes
    assert chat.code == 1


@contextmanager
def on_a_terminal(tmp_path: Path, command: str, *arguments: str) -> Iterator[pexpect.spawn]:
    """A program on a pseudo-terminal."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},  # of a make around pytest
        "XDG_STATE_HOME": str(tmp_path),
        "TERM": "xterm",
        "PYTHONPATH": str(ROOT),
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody answers questions about the cursor here
    }
    child = pexpect.spawn(
        command, [*arguments], cwd=str(ROOT), env=environment, encoding="utf-8", timeout=60, dimensions=(40, 100)
    )
    try:
        yield child
    finally:
        child.close(force=True)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[pexpect.spawn]:
    """A chat with the scripted backend."""
    with on_a_terminal(tmp_path, sys.executable, "-m", "tests.coordinator.fake_backend") as child:
        yield child


def test_who_insists_leaves_the_chat(terminal: pexpect.spawn) -> None:
    """Ctrl-C once more and once more, where an answer does not stop: that is no error."""
    terminal.expect("fake-model")
    terminal.expect(">")
    terminal.send("go on\r")
    terminal.expect("n3 ")
    for seen in ("no!", "Ctrl-C once more leaves the chat", pexpect.EOF):
        terminal.sendintr()
        terminal.expect(seen)
    terminal.wait()
    assert terminal.exitstatus == 0


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_takes_no_stopped_answer_for_an_error(tmp_path: Path) -> None:
    """`make chat`, Ctrl-C on an answer, Ctrl-D at the prompt: done."""
    program = tmp_path / "glmpipe"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -m tests.coordinator.fake_backend\n")
    program.chmod(0o755)
    stamp = tmp_path / "installed"
    stamp.touch()
    arguments = ("--no-print-directory", "-o", str(stamp), f"STAMP={stamp}", f"BIN={tmp_path}", "chat")
    with on_a_terminal(tmp_path, "make", *arguments) as terminal:
        terminal.expect("fake-model")
        terminal.expect(">")
        terminal.send("count\r")
        terminal.expect("n3 ")
        terminal.sendintr()
        terminal.expect("stopped")
        terminal.expect(">")
        terminal.send("\x04")
        terminal.expect(pexpect.EOF)
        terminal.wait()
        assert (terminal.exitstatus, terminal.signalstatus) == (0, None)


def test_on_a_terminal(terminal: pexpect.spawn, tmp_path: Path) -> None:
    """Greeting, a wide question, a new line by Alt-Enter, Ctrl-C on an answer and at the prompt, history, Ctrl-D."""

    def at_the_prompt(keys: str) -> None:
        terminal.expect(">")  # before that the terminal itself would act on some of them
        terminal.send(keys)

    terminal.expect("fake-model")
    at_the_prompt("你好\r")
    terminal.expect("1: 你好")
    at_the_prompt("\x1b[A\r")  # up: the same question again
    terminal.expect("3: 你好")
    at_the_prompt("one\x1b\rtwo\r")
    terminal.expect(r"5: one\r+\ntwo")
    at_the_prompt('"""\rblock\r"""\r')
    terminal.expect("7: block")
    at_the_prompt("count\r")
    terminal.expect("n3 ")
    terminal.sendintr()
    terminal.expect("stopped")
    at_the_prompt("half a line")
    terminal.sendintr()
    terminal.expect("Ctrl-D or stop leaves")
    at_the_prompt("\x04")
    terminal.expect(pexpect.EOF)
    terminal.wait()
    assert terminal.exitstatus == 0
    history = tmp_path / "glmpipe" / "chat_history"
    assert "你好" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700


def test_history_is_in_the_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG_STATE_HOME where it is set to a path, ~/.local/state otherwise."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "glmpipe" / "chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_file().is_relative_to(Path.home() / ".local" / "state")
