"""Strict translation between frozen dataclasses and plain msgpack values, built once per class from its annotations.

Understands bounded int, float and str (see limits.py), bool, Literal of strings, `X | None`, bounded tuple[X, ...],
dataclasses and tagged unions of them, {"t": type name, "b": fields}. The same checks run in both directions: what
cannot be read is never written.
"""

import dataclasses
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from protocol.errors import MessageError
from protocol.limits import FloatRange, IntRange, MaxLength

Convert = Callable[[Any], Any]


class Coder(NamedTuple):
    """`dump` turns a field's value into what msgpack takes, `load` turns it back; both raise MessageError."""

    dump: Convert
    load: Convert


_records: dict[type, Coder] = {}


def record_coder(cls: type) -> Coder:
    """The coder of a dataclass; its plain form is a map with exactly the fields."""
    if cls not in _records:
        _records[cls] = _build_record(cls)
    return _records[cls]


def _build_record(cls: type) -> Coder:
    hints = get_type_hints(cls, include_extras=True)
    coders = tuple((field.name, _coder(hints[field.name])) for field in dataclasses.fields(cls))
    names = frozenset(name for name, _ in coders)
    dumps = tuple((name, coder.dump) for name, coder in coders)
    loads = tuple((name, coder.load) for name, coder in coders)

    def dump(value: Any) -> dict[str, Any]:
        if type(value) is not cls:
            raise MessageError(f"expected {cls.__name__}, got {type(value).__name__}")
        plain = {}
        for name, convert in dumps:
            try:
                plain[name] = convert(getattr(value, name))
            except MessageError as error:
                raise error.inside(f".{name}") from None
        return plain

    def load(plain: Any) -> Any:
        if type(plain) is not dict:
            raise MessageError(f"expected a map, got {type(plain).__name__}")
        if plain.keys() != names:
            raise _wrong_fields(plain, names)
        values = []
        for name, convert in loads:
            try:
                values.append(convert(plain[name]))
            except MessageError as error:
                raise error.inside(f".{name}") from None
        return cls(*values)

    return Coder(dump, load)


def _wrong_fields(plain: dict[str, Any], names: frozenset[str]) -> MessageError:
    missing = sorted(names - plain.keys())
    unknown = sorted(repr(name)[:40] for name in plain.keys() - names)[:5]
    parts = ["missing " + ", ".join(missing)] * bool(missing) + ["unknown " + ", ".join(unknown)] * bool(unknown)
    return MessageError("fields: " + "; ".join(parts))


def _coder(annotation: Any, bound: Any = None) -> Coder:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, bound = get_args(annotation)
        return _coder(base, bound)
    if annotation is bool:
        return _both(_check_bool)
    if annotation is int and isinstance(bound, IntRange):
        return _both(_int_check(bound))
    if annotation is float and isinstance(bound, FloatRange):
        return _float_coder(bound)
    if annotation is str and isinstance(bound, MaxLength):
        return _both(_str_check(bound))
    if origin is Literal:
        return _both(_choice_check(get_args(annotation)))
    if origin is tuple and isinstance(bound, MaxLength):
        return _tuple_coder(_coder(get_args(annotation)[0]), bound.high)
    if origin in (Union, UnionType):
        return _union_coder(get_args(annotation))
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return record_coder(annotation)
    raise TypeError(f"a message field cannot be declared as {annotation} with bound {bound}")


def _both(check: Convert) -> Coder:
    return Coder(check, check)


def _check_bool(value: Any) -> Any:
    if type(value) is not bool:
        raise MessageError(f"expected a bool, got {type(value).__name__}")
    return value


def _int_check(bound: IntRange) -> Convert:
    low, high = bound.low, bound.high

    def check(value: Any) -> Any:
        if type(value) is not int:
            raise MessageError(f"expected an int, got {type(value).__name__}")
        if not low <= value <= high:
            raise MessageError(f"{_short(value)} is not in {low}..{high}")
        return value

    return check


def _short(value: int) -> str:
    """Digits of an int, which Python refuses for thousands of them."""
    return str(value) if abs(value) < 2**64 else f"an int of {value.bit_length()} bits"


def _float_coder(bound: FloatRange) -> Coder:
    low, high = bound.low, bound.high

    def load(value: Any) -> Any:
        if type(value) is not float:
            raise MessageError(f"expected a float, got {type(value).__name__}")
        if not low <= value <= high:
            raise MessageError(f"{value} is not in {low}..{high}")
        return value

    def dump(value: Any) -> Any:
        if type(value) is int and low <= value <= high:
            return float(value)
        return load(value)

    return Coder(dump, load)


def _str_check(bound: MaxLength) -> Convert:
    limit = bound.high

    def check(value: Any) -> Any:
        if type(value) is not str:
            raise MessageError(f"expected a string, got {type(value).__name__}")
        if len(value) > limit:
            raise MessageError(f"{len(value)} characters, at most {limit} are allowed")
        return value

    return check


def _choice_check(choices: tuple[str, ...]) -> Convert:
    allowed = frozenset(choices)

    def check(value: Any) -> Any:
        if type(value) is not str or value not in allowed:
            raise MessageError(f"{value!r:.40} is none of {', '.join(choices)}")
        return value

    return check


def _tuple_coder(item: Coder, limit: int) -> Coder:
    def convert_with(convert: Convert, expected: type[Any], result: Callable[[list[Any]], Any]) -> Convert:
        def convert_all(values: Any) -> Any:
            if type(values) is not expected:
                raise MessageError(f"expected a {expected.__name__}, got {type(values).__name__}")
            if len(values) > limit:
                raise MessageError(f"{len(values)} entries, at most {limit} are allowed")
            try:
                return result([convert(value) for value in values])
            except MessageError:
                raise _located(convert, values) from None

        return convert_all

    return Coder(convert_with(item.dump, tuple, list), convert_with(item.load, list, tuple))


def _located(convert: Convert, values: Any) -> MessageError:
    """Run the failing conversion again to say at which index: only the failing way pays for counting."""
    for index, value in enumerate(values):
        try:
            convert(value)
        except MessageError as error:
            return error.inside(f"[{index}]")
    raise AssertionError("a conversion failed once and then did not")


def _union_coder(options: tuple[Any, ...]) -> Coder:
    rest = tuple(option for option in options if option is not NoneType)
    coder = _coder(rest[0]) if len(rest) == 1 else _tagged_coder(rest)
    return _optional_coder(coder) if len(rest) < len(options) else coder


def _optional_coder(coder: Coder) -> Coder:
    def dump(value: Any) -> Any:
        return None if value is None else coder.dump(value)

    def load(value: Any) -> Any:
        return None if value is None else coder.load(value)

    return Coder(dump, load)


def _tagged_coder(classes: tuple[type, ...]) -> Coder:
    by_class = {cls: (cls.__name__, record_coder(cls).dump) for cls in classes}
    by_name = {cls.__name__: record_coder(cls).load for cls in classes}
    names = ", ".join(by_name)

    def dump(value: Any) -> Any:
        if type(value) not in by_class:
            raise MessageError(f"expected one of {names}, got {type(value).__name__}")
        name, convert = by_class[type(value)]
        return {"t": name, "b": convert(value)}

    def load(plain: Any) -> Any:
        if type(plain) is not dict or plain.keys() != {"t", "b"}:
            raise MessageError('expected a map of "t" and "b"')
        name = plain["t"]
        if type(name) is not str or name not in by_name:
            raise MessageError(f"{name!r:.40} is none of {names}")
        return by_name[name](plain["b"])

    return Coder(dump, load)
