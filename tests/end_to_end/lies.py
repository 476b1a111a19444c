"""One false field of a message, for every field of it: what a peer that is let in could say. See `lying_worker`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from protocol.records import Record, with_changes

DOUBLED = "doubled"
"""As the value of a list: what there is, twice."""
_NUMBERS = (0, 1_000_000, 2**63 - 1)
_TIMES = (0.0, 1e6, 1e12)
_WORDS = ("", "stage-1", "x" * 200, "\x1b[2J\n[pipeline] all is well", "cuda:7")


@dataclass(frozen=True)
class Lie:
    """`path` leads to a field, through records by name and through lists by number."""

    kind: str
    path: tuple[str | int, ...]
    value: Any

    def write(self, path: Path) -> None:
        """For the liar to find, whole or not at all."""
        path.with_suffix(".new").write_text(json.dumps(asdict(self)))
        path.with_suffix(".new").replace(path)

    @classmethod
    def read(cls, path: Path) -> "Lie | None":
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        return cls(found["kind"], tuple(found["path"]), found["value"])


def lies(kind: type[Record]) -> list[Lie]:
    """All there are of a kind of message."""
    return [Lie(kind.__name__, path, value) for path, value in _of_record(kind)]


def told(message: Any, path: Sequence[str | int], value: Any) -> Any:
    """The message with the lie in it; KeyError where it has no such place."""
    if not path:
        if isinstance(message, tuple):
            return message * 2 if value == DOUBLED else tuple(value)
        return value
    name, *rest = path
    if isinstance(name, int):
        if not isinstance(message, tuple) or name >= len(message):
            raise KeyError(name)
        return (*message[:name], told(message[name], rest, value), *message[name + 1 :])
    if not isinstance(message, Record) or not hasattr(message, name):
        raise KeyError(name)
    return with_changes(message, **{name: told(getattr(message, name), rest, value)})


def _of_record(kind: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        for path, value in _of_field(hints[field.name]):
            yield (field.name, *path), value


def _of_field(annotation: Any) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _of_field(args[0])
    elif origin in (Union, UnionType):
        for arg in args:
            yield from _of_field(arg)
    elif origin is Literal:
        yield from (((), value) for value in args)
    elif origin is tuple:
        yield from (((), value) for value in ((), DOUBLED))
        for index in (0, 1):
            yield from (((index, *path), value) for path, value in _of_field(args[0]))
    elif isinstance(annotation, type) and issubclass(annotation, Record):
        yield from _of_record(annotation)
    elif annotation is bool:
        yield from (((), value) for value in (False, True))
    else:
        values = {int: _NUMBERS, float: _TIMES, str: _WORDS, NoneType: (None,)}[annotation]
        yield from (((), value) for value in values)
