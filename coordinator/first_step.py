"""An empty step through all stages that have just become ready: whether hidden states get from each to the next."""

from collections.abc import Callable, Sequence

import torch

from coordinator.errors import StepStuck
from coordinator.pipeline import PROBE_STEP_ID, Pipeline
from protocol.data import Step

FIRST_STEP_S = 30.0
"""There is nothing to compute: this is the time that connections may take to come about."""


def send_first_step(pipeline: Pipeline, epoch: int, hidden_size: int, hop: Callable[[], str]) -> None:
    """Send one through, wait until it is back; `hop` says where it seems to be.

    Raises:
        StepStuck: it did not come back. StageLost: a stage was lost meanwhile.
    """
    try:
        pipeline.submit(Step(epoch, PROBE_STEP_ID, (), (), ()), torch.zeros(0, hidden_size), _limit_s)
        pipeline.collect(epoch, _limit_s)
    except StepStuck:
        text = f"an empty step that tries the way did not come back within {FIRST_STEP_S:g} s"
        raise StepStuck(f"{text}; it seems to be lost {hop()}") from None


def stuck_hop(num_steps: Sequence[int], names: Sequence[str], endpoints: Sequence[str]) -> str:
    """Where an epoch's first step is, if the stages have done so many steps.

    `endpoints` are where each stage listens, and behind them where the outcomes are awaited.
    """
    reached = next((index for index, count in enumerate(num_steps) if not count), len(num_steps))
    come = "this host" if reached == 0 else names[reached - 1]
    go = "this host" if reached == len(num_steps) else names[reached]
    return f"between {come} and {go}: can {endpoints[reached]} be reached from there?"


def _limit_s() -> float:
    return FIRST_STEP_S
