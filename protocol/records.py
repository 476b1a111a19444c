"""`Record`: what messages and their parts are made of, so that reading and writing them is strict and costs little."""

from typing import Any, TypeVar

import msgspec

Fields = dict[str, Any]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """An immutable record whose fields travel in a msgpack map, each declared with its bounds (see limits.py).

    Building one checks nothing but what its `__post_init__` does; `wire` checks every field of what comes and goes.
    """


class Variant(Record, frozen=True, tag_field="t", tag=True):
    """One of several records that may stand in the same place: its class's name travels with it, as `t`."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


def with_changes(record: AnyRecord, **changes: Any) -> AnyRecord:
    """A record like another one but for these fields."""
    return msgspec.structs.replace(record, **changes)


def as_builtins(record: Record) -> Fields:
    """The record's fields by name, the records inside it as dicts too; for JSON."""
    fields: Fields = msgspec.to_builtins(record)
    return fields
