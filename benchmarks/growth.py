"""How a decode step's time grows with the sequences in it and with their context: a plot, and what sets its slope.

    python -m benchmarks.growth [--precision int4] [--layers 4] [--threads 2] [--rounds 9] [--svg FILE] [--json FILE]

Some layers of the ChatGLM2-6B shape, as a worker holds them, and lm_head; a layer's time does not depend on how many
there are, so the figures are those of all 28: `28 / --layers` times the layers', plus lm_head's. Caches are filled with
numbers, not by computing prompts. Every round walks all points, contexts 256 to 8192 by 1 to 64 sequences, and a
point's figure is its median. Fitted to all of them: seconds = step + sequences * (token + context * cached token),
lines for each number of sequences, whose slope is what one more cached token of every sequence costs.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.figures import Figure, options_parser, publish, say
from benchmarks.plot import Panel, svg
from glm.attention import Segment
from glm.config import load_config
from glm.ends import Head, end_placement
from glm.kv_cache import SequenceCache
from glm.model import LayerStack
from glm.model_source import open_checkpoint
from glm.precision import Precision

MODEL = Path("random:chatglm2-6b")
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)

Point = tuple[int, int]
"""Sequences in the step, and cached tokens of each."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a step costs, of a number of sequences: seconds without any context, and for a cached token of each."""

    step_s: float
    cached_token_s: float


class Stack:
    """Layers and lm_head with caches for the most sequences, filled to any length."""

    def __init__(self, precision: str, num_layers: int) -> None:
        checkpoint, config, cpu = open_checkpoint(MODEL), load_config(MODEL), torch.device("cpu")
        self.layers = LayerStack.load(checkpoint, config, 0, num_layers, Precision(precision), cpu)
        placement = end_placement(Precision(precision), cpu, config)
        self._head = Head.load(checkpoint, config, placement, placement, None)
        self._scale = config.num_layers / num_layers
        self._caches = [_filled(self.layers, max(CONTEXTS)) for _ in range(max(SEQUENCES))]

    def step_s(self, point: Point) -> float:
        """Seconds of one decode step at the size of the whole model."""
        num_sequences, context = point
        caches = self._caches[:num_sequences]
        for cache in caches:
            cache.length = context
        hidden = torch.randn(num_sequences, self.layers.config.hidden_size)
        begin_s = time.perf_counter()
        hidden = self.layers.forward(hidden, [Segment(cache, context, 1) for cache in caches])
        middle_s = time.perf_counter()
        self._head.forward(hidden)
        return self._scale * (middle_s - begin_s) + time.perf_counter() - middle_s

    @property
    def kv_bytes_per_token(self) -> float:
        """Of all layers of the whole model."""
        return self._scale * self.layers.kv_bytes_per_token


def _filled(layers: LayerStack, most_tokens: int) -> SequenceCache:
    """A cache with numbers in all places, its length 0."""
    cache = layers.new_cache()
    cache.reserve(most_tokens + 1)
    for layer in range(len(layers.blocks)):
        for tensor in cache.tensors(layer):
            tensor.fill_(0.1)
    return cache


def fit(points: dict[Point, float], num_sequences: int) -> Fit:
    """The straight line through the points of one number of sequences, by least relative squares."""
    chosen = [(context, seconds) for (count, context), seconds in points.items() if count == num_sequences]
    rows = torch.tensor([[1 / seconds, context / seconds] for context, seconds in chosen], dtype=torch.float64)
    ones = torch.ones(len(chosen), 1, dtype=torch.float64)
    step_s, cached_token_s = torch.linalg.lstsq(rows, ones).solution.flatten().tolist()
    return Fit(step_s, cached_token_s)


def panels(points: dict[Point, float]) -> list[Panel]:
    """The step's time over the context, and tokens a second over the number of sequences."""
    times = {f"{n} sequence{'s' * (n > 1)}": [(c, 1e3 * points[n, c]) for c in CONTEXTS] for n in SEQUENCES}
    speeds = {f"context {c}": [(n, n / points[n, c]) for n in SEQUENCES] for c in CONTEXTS}
    return [
        Panel("Time of a decode step", "cached tokens of each sequence", "ms", times),
        Panel("Speed of all sequences together", "sequences in a step", "tokens a second", speeds),
    ]


def figures(taken: dict[Point, list[float]], kv_bytes_per_token: float) -> list[Figure]:
    """The table: what the slopes are, and at which speed that reads the cache."""
    points = {point: statistics.median(values) for point, values in taken.items()}
    found = [
        Figure(f"step of {n} behind {c} tokens each", "ms", tuple(1e3 * s for s in taken[n, c]))
        for n, c in itertools.product(SEQUENCES, CONTEXTS)
    ]
    for n in SEQUENCES:
        line = fit(points, n)
        per_token_s = line.cached_token_s / n
        found += [
            Figure(f"step of {n}, no context", "ms", (1e3 * line.step_s,)),
            Figure(f"step of {n}, a cached token of one sequence more", "us", (1e6 * per_token_s,)),
            Figure(f"step of {n}, keys and values read", "GB/s", (kv_bytes_per_token / per_token_s / 1e9,)),
        ]
    return found


def run(options: argparse.Namespace) -> tuple[dict[Point, list[float]], float]:
    """Seconds of every point in every round, and the KV cache's bytes for a token."""
    say(f"{options.precision}: loading {options.layers} layers, filling caches")
    stack = Stack(options.precision, options.layers)
    taken: dict[Point, list[float]] = {point: [] for point in itertools.product(SEQUENCES, CONTEXTS)}
    for point in taken:
        stack.step_s(point)
    for number in range(options.rounds):
        say(f"round {number + 1} of {options.rounds}")
        for point, values in taken.items():
            values.append(stack.step_s(point))
    return taken, stack.kv_bytes_per_token


def main() -> None:
    parser = options_parser(__doc__, rounds=9)
    parser.add_argument("--precision", choices=("int4", "int8", "bf16"), default="int4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the plot")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        taken, kv_bytes_per_token = run(options)
    publish(figures(taken, kv_bytes_per_token), options)
    if options.svg is not None:
        medians = {point: statistics.median(values) for point, values in taken.items()}
        options.svg.write_text(svg(panels(medians)), encoding="utf-8")


if __name__ == "__main__":
    main()
