"""`/set temperature=0.3 stop "END"`: sampling params as somebody types them in a chat."""

import dataclasses
import json
import re
from collections.abc import Iterable
from typing import Any

from coordinator.errors import UsageError
from coordinator.report import two_columns
from glm.command_line import nearest
from glm.errors import SamplingError
from glm.sampling_params import ALLOWED
from glm.sampling_params import SamplingParams as CheckedParams
from protocol.client import SamplingParams
from protocol.records import with_changes

_PAIR = re.compile(r"""\s*([\w-]+)(?:\s*=\s*|\s+)("(?:[^"\\]|\\.)*"|\[[^]]*\]|[^\s,"\[=][^\s,"\[]*)\s*,?""")
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
_FLAGS = ("ignore_eos", "greedy")


def changed(current: SamplingParams, text: str) -> SamplingParams:
    """The params with what `text` says changed.

    Raises:
        UsageError: unknown names or impossible values; it says what is allowed.
    """
    given: dict[str, Any] = {name: _value(name, value) for name, value in _pairs(text)}
    params = with_changes(current, **given)
    try:
        CheckedParams(**{field.name: getattr(params, field.name) for field in dataclasses.fields(CheckedParams)})
    except SamplingError as error:
        raise UsageError(str(error)) from None
    if params.ignore_eos and params.max_new_tokens is None:
        raise UsageError("ignore_eos needs max_new_tokens: nothing else would end the answer")
    return params


def names_only(text: str) -> tuple[str, ...] | None:
    """The settings that `text` asks to see: those it names, all if it is empty; None where it sets something."""
    names = tuple(_name(word) for word in text.replace(",", " ").split())
    return (names or tuple(ALLOWED)) if all(name in ALLOWED for name in names) else None


def setting_lines(params: SamplingParams, names: Iterable[str], width: int | None = None) -> list[str]:
    """These settings with their values and what they may be, aligned, in `width` columns."""
    return two_columns([(f"{name}={_shown(getattr(params, name))}", ALLOWED[name][0]) for name in names], width)


def difference(before: SamplingParams, after: SamplingParams) -> str:
    """The settings that changed, with their new values."""
    names = [name for name in ALLOWED if getattr(before, name) != getattr(after, name)]
    return ", ".join(f"{name}={_shown(getattr(after, name))}" for name in names)


def ineffective(params: SamplingParams) -> list[str]:
    """Settings that greedy choice leaves without effect, for a warning."""
    if not params.greedy:
        return []
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return [name for name, value in neutral.items() if getattr(params, name) != value]


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs, end = [], 0
    while match := _PAIR.match(text, end):
        pairs.append((_name(match[1]), match[2]))
        end = match.end()
    unknown = [f"{name}{_guess(name)}" for name, _ in pairs if name not in ALLOWED]
    if unknown:
        raise UsageError(f"there is no setting {', '.join(unknown)}; there are {', '.join(ALLOWED)}")
    rest = text[end:].strip()
    if rest or not pairs:
        guess = _guess(rest) if _name(rest) not in ALLOWED else ""
        raise UsageError(f"{rest!r} sets nothing{guess}; write /set temperature 0.3, or /set temperature to see it")
    return pairs


def _name(word: str) -> str:
    """As the options of the command line are spelled, too: `top-k`."""
    return word.replace("-", "_").lower()


def _guess(name: str) -> str:
    meant = nearest(name, list(ALLOWED))
    return "" if meant is None else f" (did you mean {meant}?)"


def _value(name: str, text: str) -> object:
    """The value meant; what cannot be understood stays text, for the check to complain about."""
    if name == "stop":
        return _stop_strings(text)
    word = text.strip('"').lower()
    if word == "none":
        return None
    if name in _FLAGS:
        return _WORDS.get(word, text)
    try:
        return float(word) if name in _FLOATS else int(word)
    except ValueError:
        return text


def _stop_strings(text: str) -> object:
    if text.lower() == "none":
        return ()
    if text[0] not in '"[':
        return (text,)
    try:
        value = json.loads(text)
    except ValueError:
        raise UsageError(f'stop={text} is not readable; write stop="END" or stop=["one", "two"]') from None
    return tuple(value) if isinstance(value, list) else (value,)


def _shown(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return json.dumps(value, ensure_ascii=False)
    return str(value).lower() if isinstance(value, bool) else str(value)
