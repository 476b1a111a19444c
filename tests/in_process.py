"""The stages of a pipeline chained in this process: what the sockets carry, without the sockets."""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coordinator.engine import Engine
from coordinator.pipeline import Outcome
from coordinator.scheduler import SchedulerSettings
from coordinator.sequence import Sequence
from glm.checkpoint import Checkpoint
from glm.config import ModelConfig, load_config
from glm.ends import Embedding, Head, end_placement
from glm.model import LayerStack
from glm.positions import prompt_layout
from glm.precision import Precision
from glm.sampling import Sampler, SamplingParams
from protocol.data import StageTiming, Step, StepFailed
from stage_worker.errors import StepError
from stage_worker.stage import Stage

CPU = torch.device("cpu")


class InProcessPipeline:
    """Has the calls of `coordinator.pipeline.Pipeline`; a stage that fails a step ends its way, as on the wire."""

    def __init__(self, stages: list[Stage]) -> None:
        self.stages = stages
        self.steps: list[Step] = []
        self._outcomes: deque[Outcome] = deque()

    def submit(
        self, step: Step, hidden: torch.Tensor, _limit_s: object = None, *, sent: Callable[[], None] = lambda: None
    ) -> None:
        self.steps.append(step)
        started_at_s, timings = time.monotonic(), []
        message: Step | StepFailed = step
        for index, stage in enumerate(self.stages):
            received_at_s = time.monotonic()
            try:
                if isinstance(message, StepFailed):
                    stage.apply(step.updates)
                else:
                    hidden = stage.run(step, hidden)
            except StepError as failure:
                message = StepFailed(step.epoch, step.step_id, index, failure.code, str(failure), step.updates, ())
            sent_at_s = time.monotonic()
            timings.append(StageTiming(index, received_at_s, sent_at_s - received_at_s, sent_at_s, stage.kv_tokens))
        failed = isinstance(message, StepFailed)
        if not failed:
            message = Step(step.epoch, step.step_id, step.updates, step.spans, tuple(timings))
        self._outcomes.append(Outcome(message, None if failed else hidden, started_at_s, time.monotonic()))
        sent()

    def collect(self, epoch: int, _limit_s: object = None) -> Outcome:
        outcome = self._outcomes.popleft()
        assert outcome.message.epoch == epoch
        return outcome


def in_process_engine(
    model_dir: Path,
    ranges: list[tuple[int, int]],
    *,
    kv_budget_tokens: int = 100_000,
    stage_budget: int = 100_000,
    precision: Precision = Precision.FP32,
    **settings: Any,
) -> tuple[Engine, InProcessPipeline, ModelConfig]:
    """An engine over stages with these layer ranges, everything at one precision on the CPU; it keeps no prefixes."""
    config, checkpoint = load_config(model_dir), Checkpoint(model_dir)
    placement = end_placement(precision, CPU, config)
    stages = [
        Stage(LayerStack.load(checkpoint, config, start, end, precision, CPU), stage_budget) for start, end in ranges
    ]
    pipeline = InProcessPipeline(stages)
    embedding = Embedding.load(checkpoint, config, placement)
    head = Head.load(checkpoint, config, placement, placement)
    scheduling = SchedulerSettings(**{"kv_budget_tokens": kv_budget_tokens, "reuse": False, **settings})
    return Engine(embedding, head, pipeline, scheduling), pipeline, config  # type: ignore[arg-type]


def sequence_for(
    engine: Engine, config: ModelConfig, prompt_ids: list[int], max_new_tokens: int = 8, **params: object
) -> Sequence:
    """A sequence that never minds end ids, greedy unless `params` say otherwise, already added to the engine."""
    sampling = SamplingParams(**{"greedy": True, **params})  # type: ignore[arg-type]
    sequence = Sequence(
        engine.new_sequence_id(),
        prompt_ids,
        Sampler(sampling, prompt_ids),
        layout=prompt_layout(prompt_ids, config),
        end_ids=frozenset(),
        max_new_tokens=max_new_tokens,
        max_length=config.max_context,
        max_context=config.max_context,
    )
    engine.add(sequence)
    return sequence
