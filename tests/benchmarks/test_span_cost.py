"""The benchmark of steps of several tokens: both ways compute the same, and steps leave no trace."""

import pytest
import torch

from benchmarks.overhead import load
from benchmarks.span_cost import filled_cache, part_by_part, step_s
from glm.attention import Segment
from glm.kernels.native import best_kernels

pytestmark = pytest.mark.skipif(best_kernels() is None, reason="no native kernels were built here (no C++ compiler?)")


def test_both_ways_compute_the_same() -> None:
    """Whole layers in one call and part by part, after steps that left the caches as they were."""
    stack = load("tiny", "int4", 2)
    parts, cache = part_by_part(stack), filled_cache(stack, 9)
    copy = cache.fork(9)
    for way in (stack, parts):
        assert step_s(way, [cache], 9, 3) > 0
        assert cache.length == 9
    hidden = torch.randn(3, stack.config.hidden_size)
    found, wanted = stack.forward(hidden, [Segment(cache, 9, 3)]), parts.forward(hidden, [Segment(copy, 9, 3)])
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
