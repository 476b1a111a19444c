"""A byte order mark and carriage returns, which Windows writes: neither reaches the model, neither spoils a file."""

import json
from io import StringIO
from pathlib import Path

import pytest

from coordinator.chat_console import PlainConsole
from coordinator.cli import make_parser
from coordinator.commands.prompts import read_prompt
from coordinator.input_files import decoded
from coordinator.plan_file import read_plan_file
from glm.config import load_config
from protocol.client import ChatPrompt, ChatTurn, TextPrompt
from tests.tiny_checkpoints import CAUSAL

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_file_is_the_text_in_it(raw: bool, tmp_path: Path) -> None:
    """One newline at its end is the editor's, in either spelling; a lone carriage return is a character."""
    path = tmp_path / "问.txt"
    path.write_bytes(MARK + "第一行\r\n\r\nthird\rline\r\n".encode())
    options = make_parser().parse_args(["generate", "--prompt-file", str(path), *["--raw"] * raw])
    text = "第一行\n\nthird\rline"
    assert read_prompt(options) == (TextPrompt(text) if raw else ChatPrompt((ChatTurn("user", "", text),)))


def test_a_plan_and_a_config_are_read(tmp_path: Path) -> None:
    """As those without, a text of several lines in a plan too."""
    plain = b'model = """\norg/x"""\n[[stage]]\ndevice = "cpu"\nlayers = "1-4"\n'
    windows = MARK + plain.replace(b"\n", b"\r\n")
    found = []
    for name, data in (("plain", plain), ("windows", windows)):
        (tmp_path / f"{name}.toml").write_bytes(data)
        found.append(read_plan_file(tmp_path / f"{name}.toml"))
    assert found[0].model == found[1].model == "org/x"
    assert found[0].faults == found[1].faults == ()
    (tmp_path / "config.json").write_bytes(MARK + json.dumps(CAUSAL, indent=1).encode().replace(b"\n", b"\r\n"))
    assert load_config(tmp_path).num_layers == 4


def test_piped_questions_begin_with_their_text() -> None:
    """The mark of a file that is piped into a chat is no part of its first question."""
    console = PlainConsole(StringIO("\ufeff你好\n\ufeffb\n"), StringIO(), StringIO())
    questions = [console.read(), console.read()]
    assert [question.text for question in questions if question is not None] == ["你好", "\ufeffb"]


def test_only_line_ends_are_changed() -> None:
    """And only a mark at the beginning."""
    assert decoded(MARK + b"a\r\nb\rc" + MARK) == "a\nb\rc\ufeff"
