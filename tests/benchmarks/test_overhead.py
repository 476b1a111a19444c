"""The share of Python and dispatch: what is counted as inside a kernel, and what follows from it."""

import pytest
import torch

from benchmarks.overhead import Step, decode_steps, line, load, timed_kernels
from glm.kernels.native import best_kernels


@pytest.mark.skipif(best_kernels() is None, reason="no native kernels were built here")
def test_native_calls_are_timed_and_then_left_as_they_were() -> None:
    """Time passes inside during the block alone."""
    kernels = best_kernels()
    assert kernels is not None
    before = dict(vars(kernels))
    with timed_kernels() as clock:
        kernels.gate(torch.randn(1, 64))
    assert (clock.num_calls, clock.inside_s > 0) == (1, True)
    assert vars(kernels) == before
    kernels.gate(torch.randn(1, 64))
    assert clock.num_calls == 1


@pytest.mark.skipif(best_kernels() is None, reason="no native kernels were built here")
def test_a_step_is_longer_than_its_kernels() -> None:
    """All layers of a stage are one call."""
    steps = decode_steps(load("tiny", "int8", 2), context=4, num_steps=3)
    assert len(steps) == 3
    assert all(0 < step.inside_s < step.whole_s and step.num_calls == 1 for step in steps)


def test_shares_are_of_the_large_step() -> None:
    """40 ms, 1% outside; a step of tiny layers, 0.1 ms, is a quarter of a percent of it."""
    large, small = Step(0.04, 0.0396, 36), Step(0.0001, 0.00005, 18)
    assert large.overhead == pytest.approx(0.01)
    assert line("int4", [large], [small]) == "| int4 | 40.00 | 36 | 400 | 1.0% | 100 | 0.2% |"
