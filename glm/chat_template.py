"""Chat templates: Jinja texts that a model brings along, rendered in a sandbox in a process apart."""

import json
import re
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm.chat_format import ChatMessage
from glm.errors import ChatFormatError
from glm.tokenizer import Tokenizer, split_special

# A non-character: Unicode promises that no text holds it.
BROKEN = "\ufdd0"
_PROGRAM = Path(__file__).with_name("template_program.py")


class TemplateProcess:
    """A template in a process that can be lost: it has a second or so to start, no more than it needs, and no files."""

    def __init__(self, source: str) -> None:
        """Raises ChatFormatError: the source is no template."""
        self._source = source
        self._start()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises ChatFormatError: the template failed, or took more time or memory than any should."""
        if self._process.poll() is not None:
            self._start()
        return self._ask(variables)

    def _start(self) -> None:
        # A session of its own: Ctrl-C in a terminal is for the program that the user runs.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self._process)
        self._ask(self._source)

    def _ask(self, question: Any) -> str:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it has ended: a broken pipe, or no whole line
            self.close()
            raise ChatFormatError(
                "the model's chat template took more time or memory than any template should, and was stopped: "
                "get the model from its publisher, or give a plain prompt"
            ) from None
        if "error" in answer:
            raise ChatFormatError(answer["error"])
        text: str = answer["text"]
        return text


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


class TemplateFormat:
    """The chat format of models in transformers' layouts.

    Names of special tokens inside messages are broken before rendering and made whole again after the rendered text
    was cut at the true ones, so that typed ones stay ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        source = tokenizer.vocabulary.chat_template
        if source is None:
            raise ChatFormatError(
                "the model has no chat template (neither chat_template.jinja nor in tokenizer_config.json): "
                "it may be a base model; give a plain prompt, or name a chat format"
            )
        self._tokenizer = tokenizer
        try:
            self._template = TemplateProcess(source)
        except ChatFormatError as error:
            raise ChatFormatError(f"the model's chat template is not valid Jinja: {error}") from error

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        ids: list[int] = []
        for text, special_id in split_special(self._render(messages), self._tokenizer.special):
            if special_id is None:
                ids.extend(self._tokenizer.encode(text.replace(BROKEN, "")))
            else:
                ids.append(special_id)
        return ids

    def _render(self, messages: Sequence[ChatMessage]) -> str:
        if not messages:
            raise ChatFormatError("the conversation is empty: it needs at least the user's message")
        tools = [self._harmless(tool) for message in messages for tool in message.tools]
        try:
            return self._template.render(
                {
                    **self._tokenizer.vocabulary.template_variables,
                    "messages": [self._as_mapping(message) for message in messages],
                    "tools": tools or None,
                    "add_generation_prompt": True,
                }
            )
        except ChatFormatError as error:
            raise ChatFormatError(f"the model's chat template refuses this conversation: {error}") from error

    def _as_mapping(self, message: ChatMessage) -> dict[str, Any]:
        fields: dict[str, Any] = {"role": message.role, "content": self._harmless(message.content)}
        if message.metadata:
            fields["metadata"] = self._harmless(message.metadata)
        if message.tools:
            fields["tools"] = self._harmless(message.tools)
        return fields

    def _harmless(self, value: Any) -> Any:
        """The same value with a mark inside each name of a special token, also in nested JSON."""
        if isinstance(value, str):
            names = sorted(filter(None, self._tokenizer.special), key=len, reverse=True)
            if not names:
                return value
            pattern = "|".join(map(re.escape, names))
            return re.sub(pattern, lambda name: name[0][0] + BROKEN + name[0][1:], value.replace(BROKEN, ""))
        if isinstance(value, Mapping):
            return {self._harmless(key): self._harmless(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._harmless(item) for item in value]
        return value
