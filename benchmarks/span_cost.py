"""What a step of several tokens costs beside a step of one, at the shape of the 6B model: what drafts have to pay for.

    python -m benchmarks.span_cost [--shape chatglm2-6b] [--precision int4] [--layers 4] [--context 512] [--rounds 12]
                                   [--threads 2] [--tokens 1 2 4 8 16]

A stage's layers take k tokens of one sequence, as a verification does; the same part by part, with torch's attention;
then 1 token each of k sequences, as a batch does; then 4 sequences of k tokens. In turns, each between
two steps of one token that it is held against: the machine's moods cancel. Medians of these ratios; of the one token,
its milliseconds a layer.
"""

import argparse
import copy
import statistics
import time
from dataclasses import replace

import torch

from benchmarks.overhead import load
from glm.attention import Segment
from glm.kv_cache import SequenceCache
from glm.model import LayerStack

BATCH = 4


def step_s(stack: LayerStack, caches: list[SequenceCache], context: int, num_tokens: int) -> float:
    """Seconds of a step of `num_tokens` tokens of each sequence behind `context` others; the caches stay."""
    hidden = torch.randn(len(caches) * num_tokens, stack.config.hidden_size)
    segments = [Segment(cache, context, num_tokens) for cache in caches]
    started_s = time.perf_counter()
    stack.forward(hidden, segments)
    taken_s = time.perf_counter() - started_s
    for cache in caches:
        cache.truncate(context)
    return taken_s


def filled_cache(stack: LayerStack, context: int) -> SequenceCache:
    cache = stack.new_cache()
    stack.forward(torch.randn(context, stack.config.hidden_size), [Segment(cache, 0, context)])
    return cache


def part_by_part(stack: LayerStack) -> LayerStack:
    """The same weights without the call of a whole layer and without native attention."""
    blocks = [copy.copy(block) for block in stack.blocks]
    for block in blocks:
        block.native = None  # type: ignore[attr-defined]
    return LayerStack(blocks, stack.config, stack.start, replace(stack.placement, kernels=None))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="chatglm2-6b")
    parser.add_argument("--precision", choices=("int4", "int8", "bf16"), default="int4")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    stack = load(options.shape, options.precision, options.layers)
    caches = [filled_cache(stack, options.context) for _ in range(max(*options.tokens, BATCH))]
    parts = part_by_part(stack)
    one_s: list[float] = []

    def ratio(way: LayerStack, num_sequences: int, num_tokens: int) -> float:
        before_s = step_s(stack, caches[:1], options.context, 1)
        taken_s = step_s(way, caches[:num_sequences], options.context, num_tokens)
        after_s = step_s(stack, caches[:1], options.context, 1)
        one_s.extend((before_s, after_s))
        return taken_s / (0.5 * (before_s + after_s))

    kinds = [[(stack, 1, k), (parts, 1, k), (stack, k, 1), (stack, BATCH, k)] for k in options.tokens]
    found: list[list[list[float]]] = [[[] for _ in row] for row in kinds]
    for round_index in range(options.rounds + 1):
        for row, ratios in zip(kinds, found, strict=True):
            for kind, sink in zip(row, ratios, strict=True):
                taken = ratio(*kind)
                if round_index:
                    sink.append(taken)
    milliseconds = 1e3 * statistics.median(one_s) / options.layers
    print(f"{options.shape}, {options.precision}, context {options.context}: one token {milliseconds:.2f} ms a layer\n")
    print(f"| k | 1 sequence, k tokens | the same part by part | k sequences, 1 token | {BATCH} sequences, k tokens |")
    print("| --- | --- | --- | --- | --- |")
    for num_tokens, ratios in zip(options.tokens, found, strict=True):
        print(f"| {num_tokens} | " + " | ".join(f"{statistics.median(sink):.2f}" for sink in ratios) + " |")


if __name__ == "__main__":
    main()
