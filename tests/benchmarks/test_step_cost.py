"""The benchmark of prompts and steps: both are counted, in the thread that computes."""

from benchmarks.overhead import load
from benchmarks.step_cost import least_cpu_s


def test_both_are_counted() -> None:
    """A prompt and the steps behind it take time of this thread."""
    prompt_s, step_s = least_cpu_s(load("tiny", "int4", 2), 9, 3)
    assert prompt_s > 0
    assert step_s > 0
