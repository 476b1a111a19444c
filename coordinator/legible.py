"""What a peer says in words, as it may stand in a line of a log or on a terminal: filtered where it enters."""

from typing import Any

import msgspec

from coordinator.log import one_line
from protocol.records import AnyRecord, Record, with_changes


def legible(record: AnyRecord) -> AnyRecord:
    """The record with every string in it, those of records inside it too, as one line without control characters.

    For words about the peer, not for texts that a user asked for. What means something, such as a key or an address,
    has no such characters where it is valid.
    """
    changes = {}
    for field in msgspec.structs.fields(type(record)):
        before = getattr(record, field.name)
        after = _legible(before)
        if after != before:
            changes[field.name] = after
    return with_changes(record, **changes) if changes else record


def _legible(value: Any) -> Any:
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, Record):
        return legible(value)
    return tuple(map(_legible, value)) if isinstance(value, tuple) else value
