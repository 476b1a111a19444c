"""Files of prompts: what a line may say, and that every fault is told with its line."""

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.batch_prompts import LONGEST_LINE_BYTES, BatchDefaults, BatchLine, read_prompts
from coordinator.errors import PromptFileError, UsageError
from protocol.client import ChatPrompt, ChatTurn, TextPrompt, TokenPrompt

DEFAULTS = BatchDefaults()


def read(tmp_path: Path, *lines: Any, defaults: BatchDefaults = DEFAULTS) -> list[BatchLine]:
    """Lines are written as JSON, bytes as they are."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line, ensure_ascii=False).encode() for line in lines)
    )
    return list(read_prompts(path, defaults))


def faults(tmp_path: Path, line: Any, defaults: BatchDefaults = DEFAULTS) -> list[str]:
    """All that is told of a single line."""
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    told: list[str] = []
    assert list(read_prompts(path, defaults, told.append)) == []
    return told


def test_three_kinds_of_prompts(tmp_path: Path) -> None:
    """A question, a conversation, ids; a question is plain text with `raw`. Chinese stays Chinese."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好", "metadata": "m"}]
    question, chat, ids = read(tmp_path, {"prompt": "你好"}, {"messages": messages}, {"token_ids": [5, 0, 9]})
    assert question.prompt == ChatPrompt((ChatTurn("user", "", "你好"),))
    assert chat.prompt == ChatPrompt((ChatTurn("system", "", "Be brief."), ChatTurn("user", "m", "你好")))
    assert ids.prompt == TokenPrompt((5, 0, 9))
    [text] = read(tmp_path, {"prompt": " 你好"}, defaults=BatchDefaults(raw=True))
    assert text.prompt == TextPrompt(" 你好")


def test_a_line_goes_before_the_command(tmp_path: Path) -> None:
    """What it does not say is as the command says; ids and line numbers are what answers are found by."""
    defaults = BatchDefaults({"temperature": 0.5, "seed": 1}, num_answers=2, num_logprobs=3)
    plain, own = read(
        tmp_path,
        {"prompt": "a"},
        {"prompt": "a", "id": "x", "n": 4, "logprobs": 0, "seed": None, "top_k": 5, "stop": "END"},
        defaults=defaults,
    )
    assert (plain.sampling, plain.num_answers, plain.num_logprobs) == ({"temperature": 0.5, "seed": 1}, 2, 3)
    assert own.sampling == {"temperature": 0.5, "seed": None, "top_k": 5, "stop": ("END",)}
    assert (own.num_answers, own.num_logprobs) == (4, 0)
    assert (plain.key, own.key) == (("line", 1), ("id", "x"))


def test_lines_are_numbered_as_editors_do(tmp_path: Path) -> None:
    """Empty lines count; a byte order mark and carriage returns are no fault."""
    lines = read(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b"  ", {"prompt": "b"})
    assert [line.number for line in lines] == [1, 4]


def test_a_digest_tells_what_would_be_answered_otherwise(tmp_path: Path) -> None:
    """Not the spelling, the id or the number of answers; the prompt, its kind, the sampling, the log-probabilities."""
    same = [b'{"prompt":"a","top_k":1}', b'{ "top_k": 1, "prompt": "\\u0061", "id": 7, "n": 3 }']
    others: list[Any] = [
        {"prompt": "b", "top_k": 1},
        {"prompt": "a", "top_k": 2},
        {"prompt": "a"},
        {"prompt": "a", "top_k": 1, "logprobs": 0},
        {"messages": [{"role": "observation", "content": "a"}], "top_k": 1},
    ]
    digests = [line.digest for line in read(tmp_path, *same, *others)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 1 + len(others)
    [raw] = read(tmp_path, same[0], defaults=BatchDefaults(raw=True))
    assert raw.digest not in digests


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff", "not UTF-8 text (byte 0)"),
        (b"nothing", "not JSON (Expecting value, character 1)"),
        (b'{"prompt": "a"} x', "not JSON (Extra data"),
        (b'"a"', "not a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        ({}, "exactly one of prompt, messages, token_ids must be there; there is none of them"),
        ({"prompt": "a", "token_ids": [1]}, "there is prompt and token_ids"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 5}, "prompt must be a text"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ({"token_ids": []}, "token_ids must be a list of 1 to"),
        ({"token_ids": [1, True]}, "'True' is no token id"),
        ({"token_ids": [-1]}, "'-1' is no token id"),
        ({"messages": []}, "messages must be a list of 1 to"),
        ({"messages": ["a"]}, "message 1 must have role and content"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "message 1 must have role and content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool' is unknown"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message is the assistant's"),
        ({"prompt": "a", "promt": "b"}, "unknown key 'promt'; known are prompt, messages"),
        ({"prompt": "a", "id": 1.5}, "id must be a whole number or a text"),
        ({"prompt": "a", "n": 0}, "n is '0', it must be a whole number from 1"),
        ({"prompt": "a", "n": None}, "n is 'None'"),
        ({"prompt": "a", "logprobs": 21}, "logprobs is '21'"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1, it must be"),
        ({"prompt": "a", "stop": [5]}, "stop is "),
        ({"prompt": "a", "greedy": True, "top_p": 0.5}, "top_p would do nothing"),
        ({"prompt": "a", "greedy": True, "n": 2}, "2 answers would be the same one"),
        ({"prompt": "a", "ignore_eos": True}, "ignore_eos needs max_new_tokens"),
    ],
)
def test_a_fault_is_told_with_its_line(line: Any, said: str, tmp_path: Path) -> None:
    """One sentence each, about what and where."""
    [fault] = faults(tmp_path, line)
    assert fault.startswith("line 1: ")
    assert said in fault


def test_all_faults_of_a_line_are_told(tmp_path: Path) -> None:
    """Each by itself, so that a second run does not find the next one; without `tell` the first one ends it."""
    line = {"prompt": "", "x": 1, "n": 0, "top_k": -1, "top_p": 2}
    assert len(faults(tmp_path, line)) == 5
    with pytest.raises(PromptFileError, match=r"prompts\.jsonl, line 1: unknown key 'x'"):
        read(tmp_path, line)


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    """Whatever a file is, it ends here."""
    path = tmp_path / "zeros"
    with path.open("wb") as file:
        file.truncate(LONGEST_LINE_BYTES * 3)
    with pytest.raises(PromptFileError, match="line 1: longer than"):
        list(read_prompts(path, DEFAULTS))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """One line for a user."""
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        list(read_prompts(tmp_path / "absent", DEFAULTS))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"prompt": "a"},\n{"prompt": "b"}]\n', "line 1: the file is a JSON array; write its objects one a line"),
        ('\n[\n {"prompt": "a"}\n]\n', "line 2: the file is a JSON array"),
        ('{\n "prompt": "a"\n}\n', "line 1: a JSON object over several lines; write each object on one"),
    ],
)
def test_a_file_of_another_form_is_one_fault(text: str, said: str, tmp_path: Path) -> None:
    """However many lines it has, all of which would be wrong; with the remedy."""
    [told] = faults(tmp_path, text.replace("\n]", "\n," * 1000 + "]").encode())
    assert told.startswith(said)
    assert "jq -c" in told
    with pytest.raises(PromptFileError, match="line"):
        read(tmp_path, text.encode())
