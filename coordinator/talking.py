"""Talking to a model from Python, however it is reached: a question has an answer, a text goes on."""

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from coordinator.errors import UsageError
from coordinator.history import History, messages_of, text_of, turns_of
from coordinator.report import cut_note
from glm.command_line import nearest
from glm.sampling_params import SamplingParams, chosen_over
from protocol import client

Prompt = client.ChatPrompt | client.TextPrompt | client.TokenPrompt
StreamEvent = client.Delta | client.Finished
_PARAMS = tuple(field.name for field in fields(SamplingParams))


class Talking(ABC):
    """What can be asked: a model that was launched here, or a running launch. Several threads may ask at once."""

    @abstractmethod
    def describe(self) -> client.Description:
        """What runs there."""

    @abstractmethod
    def stream(self, prompt: Prompt, sampling: client.SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Generate for a prompt: any number of Delta, then one Finished."""

    def chat(self, query: str, history: object = None, **sampling: Any) -> tuple[str, History]:
        """Answer a question; returns the answer and the history with both appended.

        `history` is what an earlier answer returned, or a list of `{"role": ..., "content": ...}` and of pairs
        (question, answer); None is a new conversation. A system message may have `"tools"`, a list of JSON objects.
        `sampling` are fields of `SamplingParams`; those not given have the model's defaults.

        Raises:
            UsageError, SamplingError: what was given cannot be meant. GenerationError: the conversation does not fit,
            or a stage could not do it. ClosedError: it was closed.
        """
        reply, grown = "", list[dict[str, Any]]()
        for reply, grown in self.stream_chat(query, history, **sampling):  # noqa: B007 - the last one counts
            pass
        return reply, grown

    def stream_chat(self, query: str, history: object = None, **sampling: Any) -> Iterator[tuple[str, History]]:
        """As `chat`, yielding the answer so far and the history with it, each time its text has grown; once at least.

        An answer that breaks off, for want of context or by a bound of the model's files, is warned of.
        """
        asked = [*messages_of(history), {"role": "user", "content": text_of(query, "query")}]
        events = self.stream(client.ChatPrompt(turns_of(asked)), self._sampling(sampling))
        return _growing(events, asked, sampling.get("max_new_tokens"))

    def generate(self, prompt: str | Iterable[int], **sampling: Any) -> client.Finished:
        """Continue a text, or token ids as they are; the outcome has `.text`, `.token_ids` (the new ones), `.stats`.

        Raises as `chat`.
        """
        outcome: StreamEvent | None = None
        for outcome in self.stream(_plain_prompt(prompt), self._sampling(sampling)):  # noqa: B007
            pass
        assert isinstance(outcome, client.Finished)
        return outcome

    def _sampling(self, given: Mapping[str, Any]) -> client.SamplingParams:
        for name in given:
            if name not in _PARAMS:
                meant = nearest(name, _PARAMS)
                hint = f"did you mean {meant}?" if meant else f"there are {', '.join(_PARAMS)}"
                raise UsageError(f"{name} is no sampling param: {hint}")
        stop = given.get("stop", ())
        changed = {**given, **({"stop": (stop,) if isinstance(stop, str) else _tuple(stop)} if "stop" in given else {})}
        defaults = self.describe().defaults
        params = SamplingParams(**{**{name: getattr(defaults, name) for name in _PARAMS}, **chosen_over(changed)})
        return client.SamplingParams(**{name: getattr(params, name) for name in _PARAMS})


def _growing(
    events: Iterator[StreamEvent], asked: History, max_new_tokens: int | None
) -> Iterator[tuple[str, History]]:
    text, shown = "", None
    for event in events:
        is_over = isinstance(event, client.Finished)
        text = event.text if is_over else text + event.text
        if isinstance(event, client.Finished) and (note := cut_note(event, max_new_tokens)):
            warnings.warn(note, stacklevel=2)
        if (text and text != shown) or (is_over and shown is None):
            shown = text
            yield text, [*asked, {"role": "assistant", "content": text}]


def _plain_prompt(prompt: object) -> client.TextPrompt | client.TokenPrompt:
    if isinstance(prompt, str):
        return client.TextPrompt(prompt)
    try:
        if isinstance(prompt, Mapping | bytes | set) or not isinstance(prompt, Iterable):
            raise TypeError
        return client.TokenPrompt(tuple(map(operator.index, prompt)))
    except TypeError:
        kind = type(prompt).__name__
        raise UsageError(f"the prompt is a {kind}; it must be a text, or a list of token ids") from None


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
