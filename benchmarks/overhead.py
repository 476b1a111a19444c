"""What Python and dispatch take of a decode step at the shape of the 6B model: all that is not inside a kernel.

    python -m benchmarks.overhead [--precisions int4 int8] [--layers 7] [--context 512] [--steps 40] [--threads 2]

One token goes through a stage's layers, as a worker takes it, and every call of a native function is timed from within:
what is left of the step is the Python around them, ctypes, small torch operations, and making tensors. All layers of a
stage are one call, so its share falls with their number: a stage of 7 is a quarter of the model, and does not fit a
cache. Beside it, as a check that needs no clock inside: the step of a stage whose layers are so small that nothing but
this is left of them, over that of the large one.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm.attention import Segment
from glm.config import load_config
from glm.kernels.native import best_kernels
from glm.model import LayerStack
from glm.model_source import open_checkpoint
from glm.precision import Precision

UNTIMED_STEPS = 5


@dataclass
class Clock:
    """Seconds inside native functions, and their calls; grows."""

    inside_s: float = 0.0
    num_calls: int = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        def timed(*arguments: Any) -> Any:
            started_s = time.perf_counter()
            found = function(*arguments)
            self.inside_s += time.perf_counter() - started_s
            self.num_calls += 1
            return found

        return timed


@dataclass(frozen=True, slots=True)
class Step:
    """A decode step: all of it, and what of it was inside native functions."""

    whole_s: float
    inside_s: float
    num_calls: int

    @property
    def overhead(self) -> float:
        """Share outside the native functions."""
        return 1 - self.inside_s / self.whole_s


@contextmanager
def timed_kernels() -> Iterator[Clock]:
    """All functions of the native library in use, timed, until the block is left."""
    kernels, clock = best_kernels(), Clock()
    assert kernels is not None
    plain = {name: value for name, value in vars(kernels).items() if hasattr(value, "argtypes")}
    for name, function in plain.items():
        setattr(kernels, name, clock.around(function))
    try:
        yield clock
    finally:
        for name, function in plain.items():
            setattr(kernels, name, function)


def load(shape: str, precision: str, num_layers: int) -> LayerStack:
    model = Path(f"random:{shape}")
    config = load_config(model)
    return LayerStack.load(open_checkpoint(model), config, 0, num_layers, Precision(precision), torch.device("cpu"))


def decode_steps(stack: LayerStack, context: int, num_steps: int) -> list[Step]:
    """Steps of one token behind `context` others."""
    cache = stack.new_cache()
    size = stack.config.hidden_size
    stack.forward(torch.randn(context, size), [Segment(cache, 0, context)])
    found = []
    token = torch.randn(1, size)
    for position in range(context, context + UNTIMED_STEPS + num_steps):
        with timed_kernels() as clock:
            started_s = time.perf_counter()
            stack.forward(token, [Segment(cache, position, 1)], before_layer=lambda: None)
            whole_s = time.perf_counter() - started_s
        found.append(Step(whole_s, clock.inside_s, clock.num_calls))
    return found[UNTIMED_STEPS:]


def line(precision: str, large: list[Step], small: list[Step]) -> str:
    """A row of the table, medians over the steps."""
    whole_s = statistics.median(step.whole_s for step in large)
    small_s = statistics.median(step.whole_s for step in small)
    share = statistics.median(step.overhead for step in large)
    return (
        f"| {precision} | {1e3 * whole_s:.2f} | {large[0].num_calls} | {1e6 * share * whole_s:.0f} | {share:.1%} "
        f"| {1e6 * small_s:.0f} | {small_s / whole_s:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", choices=("int4", "int8", "bf16"), default=["int4", "int8"])
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| precision | ms a step | calls | us outside them | share | us of a step of tiny layers | share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for precision in options.precisions:
        tiny = load("tiny", precision, load_config(Path("random:tiny")).num_layers)
        small = decode_steps(tiny, context=1, num_steps=5 * options.steps)
        stack = load("chatglm2-6b", precision, options.layers)
        large = decode_steps(stack, options.context, options.steps)
        print(line(precision, large, small), flush=True)


if __name__ == "__main__":
    main()
