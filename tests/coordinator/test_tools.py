"""Tools reach the model by every way that a conversation has, or are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.batch_prompts import BatchDefaults, read_prompts
from coordinator.cli import main, make_parser
from coordinator.commands.prompts import read_prompt
from coordinator.conversation import Conversation
from coordinator.errors import GenerationError, PromptFileError, UsageError
from coordinator.prompts import prompt_ids
from coordinator.saved_chat import as_json, read_saved
from coordinator.tools import read_tools, tools_of, tools_text
from glm.chat_format import ChatMessage, chat_format_for
from glm.errors import ChatFormatError
from glm.tokenizer import Tokenizer, load_tokenizer
from protocol.client import ChatPrompt, ChatTurn
from protocol.limits import MAX_PROMPT
from tests.tiny_checkpoints import CAUSAL
from tests.tiny_tokenizers import tiny_config, train_chatglm, train_chatglm2, train_tokenizer_json

WEATHER = {"name": "天气", "description": "The weather of a city.", "parameters": {"city": {"type": "string"}}}
TEXT = tools_text([WEATHER])
SYSTEM = ChatTurn("system", "", "Be brief.", TEXT)
QUESTION = ChatTurn("user", "", "你好")


@pytest.fixture
def chatglm3(tmp_path: Path) -> Tokenizer:
    train_chatglm2(tmp_path)
    return load_tokenizer(tmp_path, tiny_config("chatglm2"), "chatglm3")


def test_tools_become_token_ids_as_the_formatter_writes_them(chatglm3: Tokenizer) -> None:
    """What the wire carries is what ChatGLM3 is told; without a system text the published sentence stands there."""
    ids = prompt_ids(ChatPrompt((SYSTEM, QUESTION)), lambda: chatglm3)
    message = ChatMessage("system", "Be brief.", tools=(WEATHER,))
    assert ids == chat_format_for(chatglm3).encode([message, ChatMessage("user", "你好")])
    assert '"name": "天气"' in chatglm3.decode(ids)
    bare = chatglm3.decode(prompt_ids(ChatPrompt((ChatTurn("system", "", "", TEXT), QUESTION)), lambda: chatglm3))
    assert "You have access to the following tools:\n[" in bare


@pytest.mark.parametrize("dialect", ["chatglm", "chatglm2", "codegeex2", "template"])
@pytest.mark.parametrize("role", ["system", "user"])
def test_a_format_without_a_place_for_tools_says_so(dialect: str, role: str, tmp_path: Path) -> None:
    """It drops nothing silently; a template is found out by what it writes."""
    family = {"chatglm": "chatglm", "template": "glm"}.get(dialect, "chatglm2")
    write: dict[str, Any] = {"chatglm": train_chatglm, "chatglm2": train_chatglm2}
    if family == "glm":
        train_tokenizer_json(tmp_path, chat_template="{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}")
    else:
        write[family](tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": 0}))
    tokenizer = load_tokenizer(tmp_path, tiny_config(family), dialect)
    turns = (ChatTurn(role, "", "", TEXT), QUESTION) if role == "system" else (ChatTurn(role, "", "a", TEXT),)
    with pytest.raises(ChatFormatError, match="has no place for tools"):
        prompt_ids(ChatPrompt(turns), lambda: tokenizer)


@pytest.mark.parametrize(
    "template", ["{% for t in tools %}{{ t.name }}{% endfor %}", "{% for t in messages[0].tools %}{{ t }}{% endfor %}"]
)
def test_a_template_that_knows_tools_gets_them(template: str, tmp_path: Path) -> None:
    """In the variable of transformers, or in the system's message."""
    train_tokenizer_json(tmp_path, chat_template=template)
    tokenizer = load_tokenizer(tmp_path, tiny_config("glm"))
    assert "天气" in tokenizer.decode(prompt_ids(ChatPrompt((SYSTEM, QUESTION)), lambda: tokenizer))


def test_files_of_prompts_carry_tools(tmp_path: Path) -> None:
    """In a system message; the digest tells them apart, and is what it was where there are none."""
    path = tmp_path / "prompts"

    def read(system: dict[str, Any]) -> Any:
        messages = [{"role": "system", "content": "Be brief.", **system}, {"role": "user", "content": "你好"}]
        path.write_text(json.dumps({"messages": messages}))
        return next(read_prompts(path, BatchDefaults()))

    assert read({"tools": [WEATHER]}).prompt == ChatPrompt((SYSTEM, QUESTION))
    assert read({"tools": []}).digest == read({}).digest != read({"tools": [WEATHER]}).digest
    for system, fault in (
        ({"tools": "weather"}, "message 1: tools must be a list of JSON objects"),
        ({"tools": [3]}, "message 1: tools must be a list of JSON objects"),
        ({"role": "user", "tools": [WEATHER]}, "message 1: tools belong to the system's message, not to the user's"),
        ({"functions": []}, "may have metadata and tools, and nothing else"),
    ):
        with pytest.raises(PromptFileError, match=fault):
            read(system)


def test_a_conversation_keeps_its_tools(tmp_path: Path) -> None:
    """With every question, and in what /save writes and /load reads."""
    conversation = Conversation("Be brief.", TEXT)
    assert conversation.prompt("你好") == ChatPrompt((SYSTEM, QUESTION))
    conversation.add("你好", "hello", 5)
    path = tmp_path / "chat.json"
    path.write_text(as_json(conversation.turns))
    again = Conversation()
    again.replace(read_saved(path))
    assert again.turns == conversation.turns


@pytest.mark.parametrize("command", ["chat", "generate --prompt 你好"])
def test_the_option_is_checked_before_anything_loads(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file, and whether this model takes tools; one that does comes to its weights."""
    tools = tmp_path / "tools.json"
    words = [*command.split(), "--model", str(tmp_path), "--tools", str(tools)]
    (tmp_path / "config.json").write_text(json.dumps({**CAUSAL, "padded_vocab_size": 4096, "seq_length": 1024}))
    train_chatglm2(tmp_path)
    for content, said in (
        (None, f"--tools {tools} cannot be read: No such file"),
        ("{", f"--tools {tools} is not readable JSON"),
        ("[]", f"--tools {tools} holds no tool"),
        ("[1]", f"--tools {tools}: tools must be a list of JSON objects"),
        (TEXT, "this model takes no tools (this model's chat format has no place for tools"),
    ):
        if content is not None:
            tools.write_text(content)
        assert main(words) == 2
        assert said in capsys.readouterr().err
    tools.write_text("\ufeff" + TEXT)
    assert main([*words, "--chat-format", "chatglm3"]) == 2
    assert "has no weights" in capsys.readouterr().err


def test_one_question_carries_them(tmp_path: Path) -> None:
    """`generate --tools` puts a system message before it."""
    (tmp_path / "tools").write_text(TEXT)
    options = make_parser().parse_args(["generate", "--prompt", "你好", "--tools", str(tmp_path / "tools")])
    assert read_prompt(options) == ChatPrompt((ChatTurn("system", "", "", TEXT), QUESTION))


def test_what_a_client_may_send_as_tools() -> None:
    """A list of objects as text, and nothing else; too much is refused where it is given."""
    assert tools_of(TEXT) == (WEATHER,)
    assert tools_of("") == tools_of(tools_text([])) == tools_of(tools_text(None)) == ()
    for text in ("{", "3", "[3]", '{"name": "x"}', "[" * 100_000):
        with pytest.raises(GenerationError, match="tools"):
            tools_of(text)
    for wrong in ("x", [1], {"a": 1}, [{"a": object()}], [{"a": float("nan")}], [{"a": "x" * MAX_PROMPT}]):
        with pytest.raises(GenerationError, match="tools"):
            tools_text(wrong)
    with pytest.raises(UsageError):
        read_tools(Path("/no/such/file"))
