"""The streams of a measured workload: begun together, prefilled, then decoded round by round."""

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence

from coordinator.answer import Answer
from coordinator.bench_report import Phase, Workload
from coordinator.chat_model import ChatModel
from coordinator.closing import Closing
from coordinator.roofline import MemoryReader
from coordinator.timing import StepTiming
from glm.config import ModelConfig
from protocol.client import SamplingParams, TokenPrompt

Reporter = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and of how much."""


class Streams(Closing):
    """Answers that mind no end ids, draft nothing and reuse nothing: every token of them is computed by itself.

    A round is a token of each stream, however many steps carry it. A context manager.

    Raises, as do its methods:
        GenerationError: a stage could not do it. StageLost: one is gone.
    """

    def __init__(self, chat_model: ChatModel, workload: Workload, first: int = 0) -> None:
        """The streams' prompts are numbers `first`, `first` + 1, and so on; other numbers, other prompts."""
        self._engine = chat_model.engine
        self._workload = workload
        self._engine.forget_prefixes()
        while self._engine.load().steps_in_flight:  # of answers that were cancelled
            self._engine.step()
        self._answers: list[Answer] = []
        for number in range(first, first + workload.num_streams):
            self._answers.append(_begin(chat_model, workload, number))
            self._answers[-1].sequence.drafter = None

    def close(self) -> None:
        """Let the stages forget them."""
        self._engine.holds_answers = False
        for answer in self._answers:
            self._engine.cancel(answer.sequence)

    def prefill(self, report: Reporter) -> tuple[float, Phase]:
        """Feed all prompts, no answer going on meanwhile; seconds until the first stream had a token, and the whole."""
        started_s = time.monotonic()
        first_token_s: float | None = None
        timings: list[StepTiming] = []
        num_done = 0
        self._engine.holds_answers = True
        while num_done < len(self._answers):
            report("prefill", num_done, len(self._answers))
            timings.append(self._step())
            num_done = sum(bool(answer.sequence.new_ids) for answer in self._answers)
            if num_done and first_token_s is None:
                first_token_s = time.monotonic() - started_s
        assert first_token_s is not None
        self._engine.holds_answers = False
        return first_token_s, Phase(time.monotonic() - started_s, tuple(timings), self._num_tokens())

    def rounds(self, number: int) -> list[StepTiming]:
        """So many rounds; the chain stays filled behind them."""
        wanted = self._num_tokens() + number * len(self._answers)
        timings = []
        while self._num_tokens() < wanted:
            timings.append(self._step())
        return timings

    def decode(self, report: Reporter, readers: AbstractSequence[MemoryReader] = ()) -> Phase:
        """The workload's new tokens. What is read in between does not count, nor does emptying and filling the chain
        around it."""
        timings: list[StepTiming] = []
        wall_s, num_tokens, done = 0.0, 0, 0
        while done < self._workload.num_new_tokens:
            report("decode", done, self._workload.num_new_tokens)
            self._read(readers)
            part = min(self._workload.rounds_a_reading, self._workload.num_new_tokens - done)
            before, started_s = self._num_tokens(), time.monotonic()
            timings += self.rounds(part)
            wall_s += time.monotonic() - started_s
            num_tokens += self._num_tokens() - before
            done += part
        return Phase(wall_s, tuple(timings), num_tokens)

    def _read(self, readers: AbstractSequence[MemoryReader]) -> None:
        """Read memory while nothing else does, then let the chain fill again."""
        if not readers:
            return
        self._engine.holds_answers = True
        while self._engine.load().steps_in_flight:
            self._step()
        for reader in readers:
            reader.read()
        self._engine.holds_answers = False
        self._engine.pacing.disturb()
        self.rounds(1)

    def _num_tokens(self) -> int:
        return sum(len(a.sequence.token_ids) - a.sequence.num_prompt for a in self._answers)

    def _step(self) -> StepTiming:
        took_part = self._engine.step()
        for answer in self._answers:
            if answer.sequence.error is not None:
                raise answer.sequence.error
        timing = took_part[0][1]
        assert timing is not None
        return timing


def _begin(chat_model: ChatModel, workload: Workload, stream: int) -> Answer:
    prompt = TokenPrompt(prompt_ids(chat_model.config, workload.num_prompt_tokens, stream))
    most = workload.tokens_per_stream
    greedy = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), most, ignore_eos=True, greedy=True)
    return chat_model.begin(prompt, greedy)


def prompt_ids(config: ModelConfig, num_tokens: int, stream: int) -> tuple[int, ...]:
    """Any ids, other ones for every stream; a prefix LM's prompt ends with the marks that its layout needs."""
    marks = (config.gmask_id, config.bos_id) if config.is_prefix_lm else ()
    special = {config.mask_id, config.gmask_id, config.bos_id}
    choice = random.Random(stream)
    ids: list[int] = []
    while len(ids) < num_tokens - len(marks):
        token_id = choice.randrange(config.vocab_size)
        if token_id not in special:
            ids.append(token_id)
    return (*ids, *(mark for mark in marks if mark is not None))
