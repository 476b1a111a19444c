"""Chat templates: Jinja texts that a model brings along and that are rendered in a sandbox."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm.chat_format import ChatMessage
from glm.errors import ChatFormatError
from glm.tokenizer import Tokenizer, split_special

# A non-character: Unicode promises that no text holds it.
BROKEN = "\ufdd0"


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
            self._template = _environment().from_string(source)
        except TemplateError as error:
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
                messages=[self._as_mapping(message) for message in messages],
                tools=tools or None,
                add_generation_prompt=True,
                **self._tokenizer.vocabulary.template_variables,
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
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
            names = sorted(self._tokenizer.special, key=len, reverse=True)
            if not names:
                return value
            pattern = "|".join(map(re.escape, names))
            return re.sub(pattern, lambda name: name[0][0] + BROKEN + name[0][1:], value.replace(BROKEN, ""))
        if isinstance(value, Mapping):
            return {self._harmless(key): self._harmless(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._harmless(item) for item in value]
        return value


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that published templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
