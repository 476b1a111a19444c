"""A model without arithmetic: what comes next is a hash of everything before, so that any mistake changes the tokens.

Its one stage keeps the token ids themselves as its KV cache, by the rules of the data plane, and checks every step.
"""

import random
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from types import SimpleNamespace

import torch

from coordinator.engine import Engine
from coordinator.pipeline import Outcome
from coordinator.scheduler import SchedulerSettings
from coordinator.sequence import Sequence
from glm.positions import PromptLayout
from glm.sampling import Sampler, SamplingParams
from protocol.data import DropSequence, ForkSequence, StageTiming, Step, StepFailed, TruncateSequence

VOCABULARY = 12
MODULUS = 2**31 - 1


def prefix_hashes(token_ids: AbstractSequence[int]) -> list[int]:
    """One number for every prefix, each from the one before."""
    value, found = 7, []
    for token_id in token_ids:
        value = (value * 48271 + token_id + 1) % MODULUS
        found.append(value)
    return found


def logits_of(value: int, is_repetitive: bool) -> torch.Tensor:
    """fp32 [VOCABULARY]; a repetitive model has few states, so that its texts run in circles."""
    choice = random.Random(value % 7 if is_repetitive else value)
    return torch.tensor([choice.gauss(0, 2) for _ in range(VOCABULARY)])


def expected_ids(
    prompt_ids: AbstractSequence[int], num_new: int, params: SamplingParams, is_repetitive: bool
) -> list[int]:
    """What plain decoding, one token after the other, gives."""
    ids, sampler = list(prompt_ids), Sampler(params, prompt_ids)
    for _ in range(num_new):
        ids.append(sampler.sample(logits_of(prefix_hashes(ids)[-1], is_repetitive)))
    return ids[len(prompt_ids) :]


class HashPipeline:
    """Has the calls of `coordinator.pipeline.Pipeline`. Steps are computed when they are collected."""

    def __init__(self, kv_budget_tokens: int) -> None:
        self.cached: dict[int, list[int]] = {}
        self.steps: list[Step] = []
        self.most_in_flight = 0
        self.fails: set[int] = set()
        self._kv_budget_tokens = kv_budget_tokens
        self._in_flight: deque[tuple[Step, list[int]]] = deque()

    def submit(
        self, step: Step, hidden: torch.Tensor, _limit_s: object = None, *, sent: Callable[[], None] = lambda: None
    ) -> None:
        self.steps.append(step)
        self._in_flight.append((step, [int(i) for i in hidden[:, 0].tolist()]))
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        sent()

    def collect(self, epoch: int, _limit_s: object = None) -> Outcome:
        step, ids = self._in_flight.popleft()
        assert step.epoch == epoch
        self._update(step)
        timings = (StageTiming(0, 0.0, 0.001 * (10 + len(ids)), 0.0, self.kv_tokens),)
        if step.step_id in self.fails:
            return Outcome(
                StepFailed(epoch, step.step_id, 0, "internal", "asked to", step.updates, timings), None, 0.0, 0.0
            )
        hashes: list[int] = []
        for span in step.spans:
            own = self.cached.setdefault(span.sequence_id, [])
            assert span.start_pos <= len(own), "cache gap"
            del own[span.start_pos :]
            own += ids[: span.num_tokens]
            del ids[: span.num_tokens]
            hashes += prefix_hashes(own)[span.start_pos :]
        assert self.kv_tokens <= self._kv_budget_tokens, "the stage's budget"
        answer = Step(epoch, step.step_id, step.updates, step.spans, timings)
        return Outcome(answer, torch.tensor(hashes, dtype=torch.float64).unsqueeze(1), 0.0, 0.0)

    @property
    def kv_tokens(self) -> int:
        return sum(map(len, self.cached.values()))

    def finish(self) -> None:
        """Work off what nobody collected."""
        while self._in_flight:
            self._update(self._in_flight.popleft()[0])

    def _update(self, step: Step) -> None:
        for update in step.updates:
            match update:
                case DropSequence(sequence_id):
                    self.cached.pop(sequence_id, None)
                case TruncateSequence(sequence_id, length):
                    assert length <= len(self.cached[sequence_id])
                    del self.cached[sequence_id][length:]
                case ForkSequence(source_id, new_id, length):
                    assert length <= len(self.cached[source_id])
                    self.cached[new_id] = self.cached[source_id][:length]
            assert self.kv_tokens <= self._kv_budget_tokens, f"the stage's budget, after {update}"


def hash_engine(settings: SchedulerSettings, *, is_repetitive: bool = False) -> tuple[Engine, HashPipeline]:
    """An engine whose model is the hash."""
    pipeline = HashPipeline(settings.kv_budget_tokens)
    embedding = SimpleNamespace(forward=lambda ids: ids.to(torch.float64).unsqueeze(1))

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([logits_of(int(value), is_repetitive) for value in hidden[:, 0].tolist()])

    head = SimpleNamespace(forward=logits)
    return Engine(embedding, head, pipeline, settings), pipeline  # type: ignore[arg-type]


def request(
    engine: Engine,
    prompt_ids: AbstractSequence[int],
    num_new: int,
    params: SamplingParams,
    *,
    layout: PromptLayout | None = None,
    leader: Sequence | None = None,
) -> Sequence:
    """A sequence of exactly `num_new` tokens, added to the engine."""
    sequence = Sequence(
        engine.new_sequence_id(),
        prompt_ids,
        Sampler(params, prompt_ids),
        layout=layout,
        end_ids=frozenset(),
        max_new_tokens=num_new,
        max_length=10**6,
        max_context=10**6,
        leader=leader,
    )
    engine.add(sequence)
    return sequence
