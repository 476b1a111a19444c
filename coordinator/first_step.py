"""An empty step through all stages that have just become ready: whether hidden states get from each to the next."""

from collections.abc import Callable

import torch

from coordinator.errors import StepStuck
from coordinator.pipeline import PROBE_STEP_ID, Pipeline
from protocol.data import Step

FIRST_STEP_S = 30.0
"""There is nothing to compute: this is the time that connections may take to come about."""


def send_first_step(pipeline: Pipeline, epoch: int, hidden_size: int, where: Callable[[], str]) -> None:
    """Send one through, wait until it is back; `where` says where it seems to be.

    Raises:
        StepStuck: it did not come back. StageLost: a stage was lost meanwhile.
    """
    try:
        pipeline.submit(Step(epoch, PROBE_STEP_ID, (), (), ()), torch.zeros(0, hidden_size), _limit_s)
        pipeline.collect(epoch, _limit_s)
    except StepStuck:
        text = f"an empty step that tries the way did not come back within {FIRST_STEP_S:g} s"
        raise StepStuck(f"{text}; it seems to be lost {where()}") from None


def _limit_s() -> float:
    return FIRST_STEP_S
