"""A file of prompts, one JSON object a line: read line by line, checked, with every fault told by its line's number."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from coordinator.conversation import Prompt
from coordinator.errors import GenerationError, PromptFileError, UsageError
from coordinator.tools import tools_text
from glm.errors import SamplingError
from glm.logprobs import MOST_TOP
from glm.sampling_params import MOST, SamplingParams
from protocol.client import ChatPrompt, ChatTurn, TextPrompt, TokenPrompt
from protocol.limits import MAX_NAME, MAX_PROMPT, MAX_TOKENS, MAX_TURNS

MOST_ANSWERS = 256
"""To one prompt."""
LONGEST_LINE_BYTES = 32 * 2**20
ROLES = ("system", "user", "assistant", "observation")
_NEEDED = {"role", "content"}
PROMPT_KEYS = ("prompt", "messages", "token_ids")
SAMPLING_KEYS = tuple(each.name for each in fields(SamplingParams))
KEYS = (*PROMPT_KEYS, "id", "n", "logprobs", *SAMPLING_KEYS)

T = TypeVar("T")
Key = tuple[str, str | int]
"""What an answer is found again by: `("id", the line's id)`, else `("line", its number)`."""


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """What a command says for all lines that do not say otherwise. `raw` texts are continued, not answered.

    `special_tokens`: names of special tokens in those become these tokens.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    num_answers: int = 1
    num_logprobs: int | None = None
    raw: bool = False
    special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request. `sampling` holds what the line or the command says, by the names of `SamplingParams`.

    `digest` tells lines apart that would be answered otherwise: it covers the prompt, the sampling and the wish for
    log-probabilities, not the id and not the number of answers.
    """

    number: int
    id: str | int | None
    prompt: Prompt
    sampling: Mapping[str, Any]
    num_answers: int
    num_logprobs: int | None
    digest: str

    @property
    def key(self) -> Key:
        return ("line", self.number) if self.id is None else ("id", self.id)


def read_prompts(path: Path, defaults: BatchDefaults, tell: Callable[[str], None] | None = None) -> Iterator[BatchLine]:
    """The requests of a file, one at a time. Empty lines count as lines and ask for nothing.

    `tell` receives every fault, and reading goes on; without it the first one raises.

    Raises:
        PromptFileError: a line is not a request. UsageError: the file cannot be read.
    """
    is_first = True
    for number, data in _lines(path):
        if not data.strip():
            continue
        fault = _whole_file_fault(data) if is_first else ""
        is_first = False
        try:
            if fault:
                raise _Faults(fault)
            yield _line(number, _object(data), defaults)
        except _Faults as found:
            for each in found.faults:
                sentence = f"line {number}: {each}"
                if tell is None:
                    raise PromptFileError(path, [sentence]) from None
                tell(sentence)
        if fault:
            return


class _Faults(Exception):  # noqa: N818 - never leaves this file
    def __init__(self, *faults: str) -> None:
        self.faults = faults


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(LONGEST_LINE_BYTES + 1):
                number += 1
                if len(data) > LONGEST_LINE_BYTES:
                    raise PromptFileError(path, [f"line {number}: longer than {LONGEST_LINE_BYTES} bytes"])
                yield number, data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read: {error.strerror}") from None


def _whole_file_fault(first: bytes) -> str:
    """What is wrong with a file that begins with this line, all lines of which would be told as wrong otherwise."""
    begins = first.strip()
    if begins.startswith(b"["):
        return "the file is a JSON array; write its objects one a line, such as by jq -c '.[]' FILE"
    if begins == b"{":
        return "a JSON object over several lines; write each object on one, such as by jq -c . FILE"
    return ""


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_no_key_twice)
    except UnicodeDecodeError as error:
        raise _Faults(f"not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise _Faults(f"not JSON ({error.msg}, character {error.pos + 1})") from None
    except RecursionError:
        raise _Faults("nested too deeply") from None
    except ValueError as error:
        raise _Faults(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise _Faults('not a JSON object; write {"prompt": "..."}')
    return found


def _no_number(name: str) -> None:
    raise _Faults(f"{name} is no number that JSON knows")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Faults(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _line(number: int, given: dict[str, Any], defaults: BatchDefaults) -> BatchLine:
    """Raises _Faults with everything that is wrong with a line."""
    faults = [f"unknown key {name[:40]!r}; known are {', '.join(KEYS)}" for name in given if name not in KEYS]
    prompt = _collect(faults, lambda: _prompt(given, defaults))
    line_id = _collect(faults, lambda: _id(given.get("id")))
    num_answers = _collect(faults, lambda: _whole(given, "n", defaults.num_answers, 1, MOST_ANSWERS))
    num_logprobs = _collect(faults, lambda: _whole(given, "logprobs", defaults.num_logprobs, 0, MOST_TOP))
    sampling = _collect(faults, lambda: _sampling(given, defaults.sampling))
    if sampling and sampling.get("greedy") and num_answers and num_answers > 1:
        faults.append(f"greedy always takes the most likely token: {num_answers} answers would be the same one")
    if faults or prompt is None or sampling is None or num_answers is None:
        raise _Faults(*faults)
    digest = _digest(prompt, sampling, num_logprobs)
    return BatchLine(number, line_id, prompt, sampling, num_answers, num_logprobs, digest)


def _collect(faults: list[str], read: Callable[[], T]) -> T | None:
    """What `read` gives, or None and its faults."""
    try:
        return read()
    except _Faults as found:
        faults += found.faults
        return None


def _prompt(given: dict[str, Any], defaults: BatchDefaults) -> Prompt:
    names = [name for name in PROMPT_KEYS if name in given]
    if len(names) != 1:
        there = " and ".join(names) if names else "none of them"
        raise _Faults(f"exactly one of {', '.join(PROMPT_KEYS)} must be there; there is {there}")
    value = given[names[0]]
    if names == ["token_ids"]:
        return TokenPrompt(_token_ids(value))
    if names == ["messages"]:
        return ChatPrompt(_turns(value))
    text = _text(value, "prompt", MAX_PROMPT)
    if defaults.raw:
        return TextPrompt(text, defaults.special_tokens)
    if not text.strip():
        raise _Faults("the prompt is empty")
    return ChatPrompt((ChatTurn("user", "", text),))


def _token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TOKENS:
        raise _Faults(f"token_ids must be a list of 1 to {MAX_TOKENS} ids")
    wrong = [each for each in value if type(each) is not int or not 0 <= each <= MOST]
    if wrong:
        raise _Faults(f"token_ids: {str(wrong[0])[:40]!r} is no token id")
    return tuple(value)


def _turns(value: object) -> tuple[ChatTurn, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_TURNS:
        raise _Faults(f"messages must be a list of 1 to {MAX_TURNS} messages")
    turns = tuple(_turn(index, message) for index, message in enumerate(value, start=1))
    if turns[-1].role not in ("user", "observation"):
        raise _Faults(f"the last message is the {turns[-1].role}'s; a model answers the user or an observation")
    return turns


def _turn(index: int, message: object) -> ChatTurn:
    where = f"message {index}"
    if not isinstance(message, dict) or not _NEEDED <= message.keys() <= {*_NEEDED, "metadata", "tools"}:
        raise _Faults(f"{where} must have role and content, may have metadata and tools, and nothing else")
    if message["role"] not in ROLES:
        raise _Faults(f"{where}: role {str(message['role'])[:40]!r} is unknown; known are {', '.join(ROLES)}")
    metadata = _text(message.get("metadata", ""), f"{where}: metadata", MAX_NAME)
    content = _text(message["content"], f"{where}: content", MAX_PROMPT)
    if message.get("tools") and message["role"] != "system":
        raise _Faults(f"{where}: tools belong to the system's message, not to the {message['role']}'s")
    try:
        return ChatTurn(message["role"], metadata, content, tools_text(message.get("tools")))
    except GenerationError as error:
        raise _Faults(f"{where}: {error}") from None


def _text(value: object, name: str, longest: int) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise _Faults(f"{name} must be a text of at most {longest} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Faults(f"{name} holds half of a surrogate pair, which is no character") from None
    return value


def _id(value: object) -> str | int | None:
    if value is None or (type(value) is int and abs(value) < 2**63):
        return value
    if isinstance(value, str) and 0 < len(value) <= MAX_NAME:
        return _text(value, "id", MAX_NAME)
    raise _Faults(f"id must be a whole number or a text of 1 to {MAX_NAME} characters")


def _whole(given: dict[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = given.get(name, default)
    if name not in given or (type(value) is int and low <= value <= high):
        return value
    raise _Faults(f"{name} is {str(value)[:40]!r}, it must be a whole number from {low} to {high}")


def _sampling(given: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the command and the line say together. Raises _Faults for what is impossible or would do nothing."""
    said = {name: given[name] for name in SAMPLING_KEYS if name in given}
    if isinstance(said.get("stop"), str | list):
        said["stop"] = (said["stop"],) if isinstance(said["stop"], str) else tuple(said["stop"])
    sampling = {**defaults, **said}
    try:
        SamplingParams(**sampling)
    except SamplingError as error:
        raise _Faults(*str(error).split("; ")) from None
    useless = [name for name in ("temperature", "top_k", "top_p", "min_p") if name in sampling]
    if sampling.get("greedy") and useless:
        raise _Faults(f"greedy always takes the most likely token, so {', '.join(useless)} would do nothing")
    if sampling.get("ignore_eos") and sampling.get("max_new_tokens") is None:
        raise _Faults("ignore_eos needs max_new_tokens: nothing else would end the answer")
    for text in sampling.get("stop", ()):
        _text(text, "stop", MAX_PROMPT)
    return sampling


def _digest(prompt: Prompt, sampling: Mapping[str, Any], num_logprobs: int | None) -> str:
    plain = [
        type(prompt).__name__,
        [getattr(prompt, name) for name in prompt.__struct_fields__],
        sampling,
        num_logprobs,
    ]
    text = json.dumps(plain, sort_keys=True, default=_turn_fields)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _turn_fields(turn: ChatTurn) -> list[str]:
    return [turn.role, turn.metadata, turn.content, *([turn.tools] if turn.tools else [])]
