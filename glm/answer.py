"""What the publisher's code does to an answer before showing it, for a whole answer and for a stream of it."""

import re
from collections.abc import Callable

from glm.config import ModelConfig
from glm.decoding import StreamReplacer

TRAINING_TIME = ("[[训练时间]]", "2023年")

# ChatGLM-6B's tokenizer folds full-width punctuation; next to a Chinese character it is meant to be full-width.
FULL_WIDTH = dict(zip(",!:;?", "，！：；？", strict=True))
CHINESE = "\u4e00-\u9fff"
_NEXT_TO_CHINESE = re.compile(f"(?<=[{CHINESE}])[,!:;?]|[,!:;?](?=[{CHINESE}])")


def clean_answer(config: ModelConfig, text: str) -> str:
    """The answer as the publisher shows it: stripped, in the publisher's own layouts also with repairs."""
    text = text.strip()
    if config.family in ("chatglm", "chatglm2"):
        text = text.replace(*TRAINING_TIME)
    return _widen(text) if config.family == "chatglm" else text


class AnswerStream:
    """`clean_answer` for an answer that arrives in parts: the parts it returns make up the same text.

    Held back are only white space that may be the answer's end, a mark whose right neighbour decides its width,
    and the beginning of the phrase that is replaced.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._strip = _StripStream()
        own_layout = config.family in ("chatglm", "chatglm2")
        self._replace = StreamReplacer(*TRAINING_TIME) if own_layout else None
        self._widen = _WidenStream() if config.family == "chatglm" else None

    def push(self, text: str) -> str:
        """The cleaned text that became final with this part."""
        text = self._strip.push(text)
        if self._replace is not None:
            text = self._replace.push(text)
        return text if self._widen is None else self._widen.push(text)

    def flush(self) -> str:
        """What was held back; the answer ends here."""
        text = "" if self._replace is None else self._replace.flush()
        return text if self._widen is None else self._widen.push(text) + self._widen.flush()


def _widen(text: str) -> str:
    return _NEXT_TO_CHINESE.sub(lambda mark: FULL_WIDTH[mark[0]], text)


class _StripStream:
    """`str.strip` on a stream."""

    def __init__(self) -> None:
        self._clip: Callable[[str], str] = str.lstrip
        self._held = ""

    def push(self, text: str) -> str:
        text = self._clip(self._held + text)
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._clip = str
        return shown


class _WidenStream:
    """Full-width punctuation on a stream: the last character shown and at most one mark are remembered."""

    def __init__(self) -> None:
        self._last = ""
        self._held = ""

    def push(self, text: str) -> str:
        text = self._last + self._held + text
        start = len(self._last)
        wide = _widen(text)
        undecided = bool(text[start:]) and wide[-1] in FULL_WIDTH
        end = len(text) - 1 if undecided else len(text)
        self._held = wide[end:]
        if end > 0:
            self._last = wide[end - 1]
        return wide[start:end]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held
