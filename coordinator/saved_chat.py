"""A conversation as a file: JSON for programs, text for reading; `/save` writes both, `/load` reads both."""

import json
import re
from pathlib import Path
from typing import Any

from coordinator.errors import GenerationError, UsageError
from coordinator.tools import tools_of, tools_text
from protocol.client import ChatTurn
from protocol.limits import MAX_PROMPT, MAX_TURNS

MOST_BYTES = 64 << 20
"""A file larger than that is no conversation."""
_ROLES = ("system", "user", "assistant")
_HEADING = re.compile(rf"^({'|'.join(_ROLES)}):\n", re.MULTILINE)
_LIKE_A_HEADING = re.compile(rf"^(\\*(?:{'|'.join(_ROLES)}):)$", re.MULTILINE)
_ESCAPED_HEADING = re.compile(rf"^\\(\\*(?:{'|'.join(_ROLES)}):)$", re.MULTILINE)


def as_json(turns: tuple[ChatTurn, ...]) -> str:
    """The turns as `[{"role": ..., "content": ...}, ...]`, as `ChatModel.chat` takes for a history."""
    plain = [
        {"role": turn.role, "content": turn.content} | ({"tools": tools_of(turn.tools)} if turn.tools else {})
        for turn in turns
    ]
    return json.dumps(plain, ensure_ascii=False, indent=2) + "\n"


def as_text(turns: tuple[ChatTurn, ...]) -> str:
    r"""The turns for reading: `user:` on a line, the text, a blank line. A line of a text that looks so gets a `\`."""
    return "\n".join(f"{turn.role}:\n{_LIKE_A_HEADING.sub(_BACKSLASH, turn.content)}\n" for turn in turns)


_BACKSLASH = r"\\\1"


def read_saved(path: Path) -> tuple[ChatTurn, ...]:
    """The turns in a file that `as_json` or `as_text` gave, whichever it is.

    Raises:
        UsageError: it cannot be read, is neither, or its turns are no conversation.
    """
    text = _read(path).removeprefix("\ufeff")
    turns = _from_json(path, text) if text.lstrip().startswith(("[", "{")) else _from_text(path, text)
    first = 1 if turns and turns[0].role == "system" else 0
    for number, turn in enumerate(turns[first:]):
        if turn.role != ("user", "assistant")[number % 2]:
            raise UsageError(
                f"{path}: message {number + first + 1} is the {turn.role}'s, where the "
                f"{('user', 'assistant')[number % 2]}'s is due; user and assistant take turns, the user first"
            )
    if (len(turns) - first) % 2:
        raise UsageError(f"{path} ends with a question that has no answer; take it out, load the rest, and ask it")
    return turns


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file; name one that /save wrote")
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read(MOST_BYTES + 1)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path} cannot be read: {reason}; name a file that /save wrote") from None
    if len(text) > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES} characters: it is no conversation")
    return text


def _from_json(path: Path, text: str) -> tuple[ChatTurn, ...]:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not readable as JSON ({error}); name a file that /save wrote") from None
    if not isinstance(messages, list):
        raise UsageError(f'{path} must hold a list of messages: [{{"role": "user", "content": "..."}}, ...]')
    if len(messages) > MAX_TURNS:
        raise UsageError(f"{path} has {len(messages)} messages; a conversation has at most {MAX_TURNS}")
    return tuple(_turn(path, number, message) for number, message in enumerate(messages, start=1))


def _turn(path: Path, number: int, message: Any) -> ChatTurn:
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if role not in _ROLES or not isinstance(content, str):
        raise UsageError(
            f'{path}: message {number} is not {{"role": "user", "content": "..."}} with a role of {", ".join(_ROLES)}'
        )
    if len(content) > MAX_PROMPT:
        raise UsageError(f"{path}: message {number} has {len(content)} characters; {MAX_PROMPT} are the most")
    try:
        return ChatTurn(role, "", content, tools_text(message.get("tools")) if role == "system" else "")
    except GenerationError as error:
        raise UsageError(f"{path}: message {number}: {error}") from None


def _from_text(path: Path, text: str) -> tuple[ChatTurn, ...]:
    if re.match(rf"({'|'.join(_ROLES)}):\r\n", text):  # an editor has been there
        text = text.replace("\r\n", "\n")
    before, *parts = _HEADING.split(text)
    if before.strip() or (text.strip() and not parts):
        raise UsageError(f"{path} does not begin with user: or system: on a line; name a file that /save wrote")
    contents = [*(part.removesuffix("\n") for part in parts[1:-2:2]), *parts[-1:]]  # a blank line parts the turns
    messages = [
        {"role": role, "content": _ESCAPED_HEADING.sub(r"\1", content.removesuffix("\n"))}
        for role, content in zip(parts[::2], contents, strict=True)
    ]
    return tuple(_turn(path, number, message) for number, message in enumerate(messages, start=1))
