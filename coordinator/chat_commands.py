"""The commands of a chat: what `clear`, `stop` and the words behind a slash do."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import chat_settings
from coordinator.chat_console import Console, Entry
from coordinator.conversation import Conversation
from coordinator.errors import UsageError
from coordinator.report import report_lines, two_columns
from coordinator.saved_chat import as_json, as_text, read_saved
from coordinator.system_prompt import read_system
from glm.command_line import nearest
from protocol.client import Description, GenerationStats, SamplingParams

_SLASH = re.compile(r"[/\uff0f]([A-Za-z]+)(?:\s+(.*))?\s*", re.DOTALL)
"""A wide slash is what a Chinese keyboard gives."""
_PLAIN_WORDS = ("clear", "stop", "exit", "quit")


@dataclass(slots=True)
class ChatState:
    """What a chat remembers."""

    description: Description
    sampling: SamplingParams
    show_stats: bool = False
    conversation: Conversation = field(default_factory=Conversation)
    last_stats: GenerationStats | None = None
    saved: set[Path] = field(default_factory=set)
    """Files this chat wrote or loaded, which it may write again."""
    is_over: bool = False
    question: str | None = None
    """What a command wants asked next."""
    connect: Callable[[str | None], None] | None = None
    """Uses another launch, the one that is named or the only one; None where the chat runs its model itself."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command; `run` gets what stands behind its name."""

    usage: str
    help: str
    run: Callable[[ChatState, Console, str], None]


def run_command(state: ChatState, console: Console, entry: Entry) -> bool:
    """Carry the entry out if it is a command; says whether it was one."""
    name, argument = _parse(entry)
    if name is None:
        return False
    try:
        if name not in COMMANDS:
            raise UsageError(_unknown(name))
        COMMANDS[name].run(state, console, argument)
    except UsageError as error:
        console.note(str(error))
    return True


def _unknown(name: str) -> str:
    meant = nearest(name, list(COMMANDS))
    guess = "" if meant is None else f" (did you mean /{meant}?)"
    return f'/{name} is no command{guess}; /help lists them, and a question that begins so goes between lines of """'


def _parse(entry: Entry) -> tuple[str | None, str]:
    if entry.is_quoted:
        return None, ""
    if entry.text.strip() in _PLAIN_WORDS:
        return entry.text.strip(), ""
    match = _SLASH.fullmatch(entry.text)
    return (match[1].lower(), (match[2] or "").strip()) if match else (None, "")


def _clear(state: ChatState, console: Console, argument: str) -> None:
    _refuse("clear", argument)
    state.conversation.clear()
    console.note("the conversation starts afresh")


def _system(state: ChatState, console: Console, argument: str) -> None:
    conversation = state.conversation
    if not argument:
        console.note(conversation.system or "there is no system prompt; /system TEXT, or /system @FILE, sets one")
        return
    conversation.system = "" if argument == "none" else read_system(argument)
    if not conversation.system:
        console.note("there is no system prompt any more")
    elif conversation.rounds:
        console.note("the system prompt holds from the next answer on; `clear` forgets what was said before it")
    else:
        console.note("the system prompt is set")


def _again(state: ChatState, console: Console, argument: str) -> None:
    del console
    _refuse("again", argument)
    state.question = _take_back(state)


def _edit(state: ChatState, console: Console, argument: str) -> None:
    del console
    if not argument:
        raise UsageError("write /edit and the question that shall stand in the last one's place")
    _take_back(state)
    state.question = argument


def _take_back(state: ChatState) -> str:
    question = state.conversation.take_back()
    if question is None:
        raise UsageError("there is no question yet")
    return question


def _stop(state: ChatState, console: Console, argument: str) -> None:
    del console
    _refuse("stop", argument)
    state.is_over = True


def _help(state: ChatState, console: Console, argument: str) -> None:
    del state, argument
    console.note(*two_columns([(command.usage, command.help) for command in LISTED], console.width))
    console.note(*KEYS)


def _connect(state: ChatState, console: Console, argument: str) -> None:
    del console
    if state.connect is None:
        raise UsageError(
            "this chat runs its model itself; one that was started with --connect can go to another launch"
        )
    state.connect(argument or None)


def _plan(state: ChatState, console: Console, argument: str) -> None:
    _refuse("plan", argument)
    console.note(*state.description.plan_lines)


def _stats(state: ChatState, console: Console, argument: str) -> None:
    if argument not in ("", "on", "off"):
        raise UsageError("write /stats for the last answer's report, or /stats on and /stats off for every answer's")
    if argument:
        state.show_stats = argument == "on"
        console.note(f"a report after each answer is {argument}")
    elif state.last_stats is None:
        console.note("there is no answer yet")
    else:
        console.note(*report_lines(state.last_stats, console.width))


def _load(state: ChatState, console: Console, argument: str) -> None:
    if not argument:
        raise UsageError("write /load FILE, a file that /save wrote")
    turns = read_saved(path := _path(argument))
    num_before = len(state.conversation.rounds)
    state.conversation.replace(turns)
    state.saved.add(path)
    instead = f", in place of the {num_before} question{'s' * (num_before > 1)} of this chat" if num_before else ""
    console.note(f"read {len(turns)} messages from {path}{instead}")


def _path(argument: str) -> Path:
    try:
        return Path(argument).expanduser().absolute()
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{argument} is no place: {error}; choose another one") from None


def _save(state: ChatState, console: Console, argument: str) -> None:
    if not argument:
        raise UsageError("write /save FILE; a name that ends in .json gives JSON, any other plain text")
    path = _path(argument)
    try:
        turns = state.conversation.turns
        text = as_json(turns) if path.suffix == ".json" else as_text(turns)
        with path.open("w" if path in state.saved else "x", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{argument} exists already and is not from this chat; choose another name") from None
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{argument} cannot be written: {reason}; choose another place") from None
    state.saved.add(path)
    console.note(f"wrote {len(turns)} messages to {path}")


def _set(state: ChatState, console: Console, argument: str) -> None:
    before = state.sampling
    wanted = chat_settings.names_only(argument)
    if wanted is not None:
        console.note(*chat_settings.setting_lines(before, wanted, console.width))
        return
    is_reset = argument in ("default", "defaults")
    state.sampling = state.description.defaults if is_reset else chat_settings.changed(before, argument)
    console.note(chat_settings.difference(before, state.sampling) or "nothing changed")
    useless = chat_settings.ineffective(state.sampling)
    if useless:
        console.note(f"note: greedy is on, so {', '.join(useless)} has no effect; /set greedy=false switches it off")


def _refuse(name: str, argument: str) -> None:
    if argument:
        raise UsageError(f"/{name} takes nothing behind it, not {argument!r}")


COMMANDS = {
    "help": Command("/help", "this list", _help),
    "clear": Command("clear, /clear", "forget the conversation and start afresh; the system prompt stays", _clear),
    "exit": Command("exit, /exit, Ctrl-D", "leave the chat; so do stop, quit, /stop, /quit and /bye", _stop),
    "again": Command("/again", "another answer to the last question", _again),
    "edit": Command("/edit QUESTION", "ask something else in place of the last question", _edit),
    "system": Command("/system [TEXT|@FILE]", "show or set what the model is told before all; /system none", _system),
    "plan": Command("/plan", "which stage has which layers, where, at which precision", _plan),
    "stats": Command("/stats [on|off]", "what the last answer cost; on: after every answer", _stats),
    "save": Command("/save FILE", "write the conversation to a file (.json: as JSON)", _save),
    "load": Command("/load FILE", "go on with a conversation that /save wrote", _load),
    "connect": Command(
        "/connect [ENDPOINT|PID]", "with --connect: go on with another launch, or find it again", _connect
    ),
    "set": Command("/set [NAME[=VALUE] ...]", "show or change sampling: /set temperature 0.3; /set default", _set),
}
LISTED = tuple(COMMANDS.values())
COMMANDS |= dict.fromkeys(("stop", "quit", "bye"), COMMANDS["exit"])
KEYS = (
    "Enter sends; Esc Enter (or Alt-Enter) begins a new line; up and down walk through earlier questions",
    'a text between lines of """ is a question as it stands, of any number of lines',
    "Ctrl-C stops the answer, not the chat; Ctrl-Z suspends it, until fg",
)
