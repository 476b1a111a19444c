"""A scripted backend for chats. As a program it is a chat on whatever terminal it was started on."""

import itertools
import sys
import threading
import time
from collections.abc import Iterator

from coordinator.chat import run_chat
from coordinator.errors import GenerationError
from protocol.client import (
    ChatPrompt,
    Delta,
    Description,
    Finished,
    FinishReason,
    GenerationStats,
    SamplingParams,
    StageStats,
)
from protocol.records import with_changes

DEFAULTS = SamplingParams(
    temperature=0.8,
    top_k=0,
    top_p=0.8,
    min_p=0.0,
    repetition_penalty=1.0,
    seed=None,
    stop=(),
    max_new_tokens=None,
    ignore_eos=False,
    greedy=False,
)
STAGES = (StageStats(1, "cpu", "1-6", "fp32", 1.0, 0.125, 70),)
STATS = GenerationStats(50, 0.5, 21, 0, 0, 0, 0, 0, 2.0, 2.5, STAGES, ())


class FakeBackend:
    """Answers a question with what `answers` says, else with the number of turns and the question itself.

    The question `count` counts slowly until it is cancelled; `go on` does so even then, and says that it will not stop.
    A finish reason as a question ends the answer so, and `broken` tells of scores that were no numbers.
    """

    def __init__(self, answers: dict[str, str] | None = None) -> None:
        self.answers = answers or {}
        self.prompts: list[ChatPrompt] = []
        self.samplings: list[SamplingParams | None] = []
        self.was_cancelled = threading.Event()

    def describe(self) -> Description:
        return Description(0, "fake-model", "chatglm2", 1000, ("layers 1-6 -> fp32 -> cpu",), DEFAULTS, None)

    def stream(self, prompt: ChatPrompt, sampling: SamplingParams | None = None) -> Iterator[Delta | Finished]:
        self.was_cancelled.clear()
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        question, text, reason = prompt.turns[-1].content, "", "stop"
        if question == "too long":
            raise GenerationError("the conversation has 101 tokens, the model's context holds 100")
        for part in self._parts(question, len(prompt.turns)):
            text += part
            yield Delta(0, part, (1,))
            if self.was_cancelled.is_set() and question != "go on":
                reason = "cancelled"
                break
        if question in FinishReason.__args__:
            reason = question
        yield Finished(0, reason, text, (1,), with_changes(STATS, guarded_tokens=2 if question == "broken" else 0))

    def cancel(self) -> None:
        self.was_cancelled.set()

    def _parts(self, question: str, num_turns: int) -> Iterator[str]:
        if question in ("count", "go on"):
            for number in itertools.count() if question == "go on" else range(1000):
                yield "no! " if self.was_cancelled.is_set() else f"n{number} "
                time.sleep(0.02)
        else:
            yield from self.answers.get(question, f"{num_turns}: {question}")


if __name__ == "__main__":
    sys.exit(run_chat(FakeBackend(), DEFAULTS))
