"""Conversations as people write them in Python, made what a chat takes: messages, each a dict with role and content."""

from collections.abc import Iterable, Mapping
from typing import Any

from coordinator.errors import UsageError
from coordinator.tools import tools_text
from protocol.client import ChatTurn

History = list[dict[str, Any]]
HOW = '{"role": "user", "content": "..."} or a pair (question, answer)'
ROLES = ("system", "user", "assistant", "observation")


def messages_of(history: object) -> History:
    """What a conversation says so far, a copy: of messages (dicts), of pairs of a question and its answer, or of both.

    None is an empty one. Raises UsageError: something in it is neither; the message names it by its number.
    """
    if history is None:
        return []
    if isinstance(history, str | bytes | Mapping) or not isinstance(history, Iterable):
        raise UsageError(f"history is {_shown(history)}; it must be a list, each item {HOW}, or None")
    return [message for number, item in enumerate(history, start=1) for message in _messages(item, number)]


def turns_of(messages: Iterable[Mapping[str, Any]]) -> tuple[ChatTurn, ...]:
    """As they travel. Raises GenerationError: tools that are none."""
    return tuple(
        ChatTurn(each["role"], each.get("metadata", ""), each["content"], tools_text(each.get("tools")))
        for each in messages
    )


def text_of(value: object, what: str) -> str:
    """The text itself. Raises UsageError: it is something else; `what` says what it was to be."""
    if not isinstance(value, str):
        raise UsageError(f"{what} is {_shown(value)}; it must be a text")
    return value


def _messages(item: object, number: int) -> History:
    what = f"item {number} of history"
    if isinstance(item, Mapping):
        return [_message(item, what)]
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise UsageError(f"{what} is {_shown(item)}; it must be {HOW}")
    question, answer = text_of(item[0], f"the question of {what}"), text_of(item[1], f"the answer of {what}")
    if question in ROLES:
        raise UsageError(f'{what} begins with a role; write {{"role": "{question}", "content": ...}}')
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _message(item: Mapping[Any, Any], what: str) -> dict[str, Any]:
    unknown = [key for key in item if key not in ("role", "content", "metadata", "tools")]
    if unknown:
        known = "role, content, metadata and tools"
        raise UsageError(f"{what} has {_shown(unknown[0])}, which no chat format knows; those are {known}")
    for key in ("role", "content"):
        if key not in item:
            raise UsageError(f"{what} has no {key!r}; it must be {HOW}")
    for key in ("role", "content", "metadata"):
        text_of(item.get(key, ""), f"{key} of {what}")
    return dict(item)


def _shown(value: object) -> str:
    words = repr(value)
    return f"{words if len(words) <= 60 else words[:60] + ' ...'} ({type(value).__name__})"
