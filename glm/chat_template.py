"""Chat templates: Jinja texts that a model brings along, rendered in a sandbox in a process apart."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from glm.chat_format import ChatMessage
from glm.confined import Confined
from glm.errors import ChatFormatError
from glm.tokenizer import Tokenizer, split_special

# A non-character: Unicode promises that no text holds it.
BROKEN = "\ufdd0"


class TemplateProcess:
    """A template in a process that can be lost: it has seconds, half a gigabyte and no files."""

    def __init__(self, source: str) -> None:
        """Raises ChatFormatError: the source is no template."""
        self.confined = Confined("template", source)
        _checked(self.confined.begun)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises ChatFormatError: the template failed, or took more time or memory than any should."""
        text: str = _checked(self.confined.ask(variables))["text"]
        return text


def _checked(answer: dict[str, Any] | None) -> dict[str, Any]:
    if answer is None:
        raise ChatFormatError(
            "the model's chat template took more time or memory than any template should, and was stopped: "
            "get the model from its publisher, or give a plain prompt"
        )
    if "error" in answer:
        raise ChatFormatError(answer["error"])
    return answer


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
        mappings = [self._as_mapping(message) for message in messages]
        try:
            text = self._render_with(mappings, tools)
        except ChatFormatError as error:
            raise ChatFormatError(f"the model's chat template refuses this conversation: {error}") from error
        if tools and self._is_same_without_tools(mappings, text):
            raise ChatFormatError("the model's chat template has no place for tools: describe them in the question")
        return text

    def _is_same_without_tools(self, messages: list[dict[str, Any]], text: str) -> bool:
        without = [{key: value for key, value in message.items() if key != "tools"} for message in messages]
        try:
            return self._render_with(without, []) == text
        except ChatFormatError:  # one that insists on them
            return False

    def _render_with(self, messages: list[dict[str, Any]], tools: list[Any]) -> str:
        fixed = {**self._tokenizer.vocabulary.template_variables, "add_generation_prompt": True}
        return self._template.render({**fixed, "messages": messages, "tools": tools or None})

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
