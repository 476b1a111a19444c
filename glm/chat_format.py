"""From a conversation to a prompt's token ids, as each published model wants it."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from glm.errors import ChatFormatError
from glm.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant", "observation"]

GLM4_TOOLS_PREAMBLE = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
CHATGLM3_TOOLS_PREAMBLE = "Answer the following questions as best as you can. You have access to the following tools:"
GLM4_TOOL_HINT = "在调用上述函数时，请使用 Json 格式表示调用的参数。"


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation.

    `metadata` is the name of the tool that an assistant's message calls, usually empty. `tools` are descriptions of
    tools, as JSON objects; only a system message may have them.
    """

    role: Role
    content: str
    metadata: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


class ChatFormat(Protocol):
    """How one dialect turns a conversation into token ids. The last message is the user's, or a tool's observation."""

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of the whole conversation, ready for the assistant to go on.

        Raises:
            ChatFormatError: a role, or an order of roles, that the model was not made for.
        """
        ...


_making = threading.Lock()


def chat_format_for(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a model's dialect, the same one each time: a template has a process of its own.

    Raises:
        ChatFormatError: the model has no chat template, or its tokenizer lacks the role tokens.
    """
    with _making:
        if tokenizer.chat_format is None:
            tokenizer.chat_format = _new_chat_format(tokenizer)
        return tokenizer.chat_format


def _new_chat_format(tokenizer: Tokenizer) -> ChatFormat:
    if tokenizer.dialect == "chatglm":
        return RoundsFormat(tokenizer, first_round=0, newlines="\n", bare_first=True)
    if tokenizer.dialect == "chatglm2":
        return RoundsFormat(tokenizer, first_round=1, newlines="\n\n", bare_first=False)
    if tokenizer.dialect == "chatglm3":
        return RoleBlocksFormat(tokenizer, _chatglm3_tools)
    if tokenizer.dialect == "glm4":
        return RoleBlocksFormat(tokenizer, _glm4_tools)
    if tokenizer.dialect == "codegeex2":
        return PlainFormat(tokenizer)
    from glm.chat_template import TemplateFormat

    return TemplateFormat(tokenizer)


@dataclass(frozen=True, slots=True)
class RoundsFormat:
    """ChatGLM-6B and ChatGLM2-6B: numbered rounds of question and answer, written out as text."""

    tokenizer: Tokenizer
    first_round: int
    newlines: str
    bare_first: bool
    """Whether a question without history is passed as it is."""

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        _refuse_tools(messages)
        questions, answers = self._rounds(messages)
        if self.bare_first and not answers:
            return self.tokenizer.encode_prompt(questions[0])
        rounds = [
            f"{self._question(index, question)}{answer}{self.newlines}"
            for index, (question, answer) in enumerate(zip(questions, answers, strict=False))
        ]
        return self.tokenizer.encode_prompt("".join(rounds) + self._question(len(answers), questions[-1]))

    def _question(self, index: int, question: str) -> str:
        gap = self.newlines
        return f"[Round {index + self.first_round}]{gap}问：{question}{gap}答："

    def _rounds(self, messages: Sequence[ChatMessage]) -> tuple[list[str], list[str]]:
        for index, message in enumerate(messages):
            if message.role != ("user", "assistant")[index % 2]:
                raise ChatFormatError(
                    f"message {index + 1} is the {message.role}'s: "
                    "this model knows only user and assistant, taking turns, the user first"
                )
        _check_last(messages)
        return [message.content for message in messages[::2]], [message.content for message in messages[1::2]]


class RoleBlocksFormat:
    """ChatGLM3-6B and GLM-4-9B-chat: each message is a role token, a line of metadata, and the content."""

    def __init__(self, tokenizer: Tokenizer, with_tools: "ToolsWriter") -> None:
        needed = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
        missing = [name for name in needed if name not in tokenizer.special]
        if missing:
            raise ChatFormatError(
                f"the tokenizer has no {', '.join(missing)}: it belongs to another kind of model; name its chat format"
            )
        self._tokenizer = tokenizer
        self._with_tools = with_tools

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        _check_last(messages)
        ids = list(self._tokenizer.vocabulary.prefix_ids)
        for message in messages:
            ids.extend(self._block(message))
        return [*ids, self._tokenizer.special["<|assistant|>"]]

    def _block(self, message: ChatMessage) -> list[int]:
        role_id = self._tokenizer.special.get(f"<|{message.role}|>")
        if role_id is None:
            raise ChatFormatError(f"role {message.role!r} is unknown; known are system, user, assistant, observation")
        if message.tools and message.role != "system":
            raise ChatFormatError(f"tools belong to the system's message, not to the {message.role}'s")
        content = self._with_tools(message) if message.tools else message.content
        encode = self._tokenizer.encode
        return [role_id, *encode(f"{message.metadata}\n"), *encode(content)]


@dataclass(frozen=True, slots=True)
class PlainFormat:
    """CodeGeeX2-6B: no chat at all, the text so far is to be continued (`# language: Python` first, by convention)."""

    tokenizer: Tokenizer

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        _refuse_tools(messages)
        _check_last(messages)
        return self.tokenizer.encode_prompt("\n".join(message.content for message in messages))


class ToolsWriter(Protocol):
    """Writes a system message that describes its tools."""

    def __call__(self, message: ChatMessage, /) -> str: ...


def _chatglm3_tools(message: ChatMessage) -> str:
    return f"{message.content or CHATGLM3_TOOLS_PREAMBLE}\n{_as_json(message.tools)}"


def _glm4_tools(message: ChatMessage) -> str:
    functions = [tool.get("function", tool) for tool in message.tools]
    sections = [
        f"\n\n## {function.get('name', '')}\n\n{_as_json(function)}\n{GLM4_TOOL_HINT}" for function in functions
    ]
    return (message.content or GLM4_TOOLS_PREAMBLE) + "".join(sections)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=4)


def _refuse_tools(messages: Sequence[ChatMessage]) -> None:
    if any(message.tools for message in messages):
        raise ChatFormatError("this model's chat format has no place for tools: describe them in the question")


def _check_last(messages: Sequence[ChatMessage]) -> None:
    if not messages:
        raise ChatFormatError("the conversation is empty: it needs at least the user's message")
    if messages[-1].role not in ("user", "observation"):
        raise ChatFormatError(
            f"the last message is the {messages[-1].role}'s: the model answers only the user or an observation"
        )
