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
    """And every layer calls some."""
    steps = decode_steps(load("tiny", "int8", 2), context=4, num_steps=3)
    assert len(steps) == 3
    assert all(0 < step.inside_s < step.whole_s and step.num_calls >= 2 for step in steps)


def test_shares_are_of_one_large_layer() -> None:
    """4 layers of 10 ms, 1% outside; 2 tiny ones of 0.1 ms in all are half a percent of a large one."""
    large, small = Step(0.04, 0.0396, 36), Step(0.0001, 0.00005, 18)
    assert large.overhead == pytest.approx(0.01)
    assert line("int4", [large], [small], 4, 2) == "| int4 | 10.00 | 9 | 100 | 1.0% | 50 | 0.5% |"
