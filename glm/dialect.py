"""Which published way of talking a model has: its special ids, its chat format, its end ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from glm.config import ModelConfig
from glm.errors import TokenizerError
from glm.lineage import find_lineage

Dialect = Literal["chatglm", "chatglm2", "chatglm3", "codegeex2", "glm4", "template"]

DIALECTS: tuple[Dialect, ...] = get_args(Dialect)


@dataclass(frozen=True, slots=True)
class FoundDialect:
    """A model's dialect and why it is taken for that; `is_certain` is false for a guess."""

    dialect: Dialect
    reason: str
    is_certain: bool = True

    @property
    def note(self) -> str:
        """A line for people."""
        if self.is_certain:
            return f"chat format {self.dialect}: {self.reason}"
        others = ", ".join(name for name in ("chatglm2", "chatglm3", "codegeex2", "glm4") if name != self.dialect)
        return (
            f"chat format {self.dialect} is a guess, as {self.reason} and nothing in its files says more: if answers "
            f"look wrong, name another one with --chat-format ({others})"
        )


def find_dialect(config: ModelConfig, model_dir: Path, chat_format: str | None = None) -> FoundDialect:
    """Decide the dialect of a model; what the caller says in `chat_format` wins.

    ChatGLM2, ChatGLM3, CodeGeeX2 and GLM-4 share one config layout, see `lineage.find_lineage`.

    Raises:
        TokenizerError: `chat_format` is none of `DIALECTS`, or tokenizer_config.json is unreadable.
    """
    for dialect in DIALECTS:
        if chat_format == dialect:
            return FoundDialect(dialect, "as was asked for")
    if chat_format is not None:
        raise TokenizerError(f"chat format {chat_format!r} is not known; known are {', '.join(DIALECTS)}")
    if config.family == "chatglm":
        return FoundDialect("chatglm", "config.json has ChatGLM-6B's layout")
    if config.family in ("glm", "glm4"):
        return FoundDialect("template", "models in transformers' layout bring a chat template")
    lineage = find_lineage(config, model_dir)
    return FoundDialect(lineage.ancestor, lineage.reason, lineage.is_certain)


def detect_dialect(config: ModelConfig, model_dir: Path, chat_format: str | None = None) -> Dialect:
    """The dialect alone; see `find_dialect`."""
    return find_dialect(config, model_dir, chat_format).dialect
