"""What a step of one token and a prompt cost at each precision, of several versions of this project in turns.

    python -m benchmarks.step_cost [--shape chatglm2-6b] [--layers 2] [--prompt 512] [--rounds 3] [--trees OLD NEW]
                                   [--precisions int4 int8 bf16]

One thread's CPU time a layer, so that others on the machine count for little; the least of the rounds. `--trees`:
checkouts, native kernels built in place, each measured by a process of its own in each round; else this one alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.overhead import load
from glm.attention import Segment
from glm.model import LayerStack

PRECISIONS = ("int4", "int8", "bf16")


def least_cpu_s(stack: LayerStack, num_prompt: int, num_steps: int) -> tuple[float, float]:
    """Seconds of one thread for the prompt, and the least of the steps of one token behind it."""
    cache, prompt = stack.new_cache(), torch.randn(num_prompt, stack.config.hidden_size)
    started_s = time.thread_time()
    stack.forward(prompt, [Segment(cache, 0, num_prompt)])
    prompt_s, steps_s = time.thread_time() - started_s, []
    for _ in range(num_steps):
        started_s = time.thread_time()
        stack.forward(prompt[:1], [Segment(cache, cache.length, 1)])
        steps_s.append(time.thread_time() - started_s)
    return prompt_s, min(steps_s)


def measure(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Milliseconds a layer, of the prompt and of a step, by precision."""
    torch.set_num_threads(1)
    found = {}
    for precision in options.precisions:
        stack = load(options.shape, precision, options.layers)
        prompt_s, step_s = least_cpu_s(stack, options.prompt, 16)
        found[precision] = (1e3 * prompt_s / options.layers, 1e3 * step_s / options.layers)
    return found


def measure_tree(tree: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """`measure` by the code of another checkout."""
    wanted = ["--shape", options.shape, "--layers", str(options.layers), "--prompt", str(options.prompt)]
    command = [sys.executable, "-P", __file__, "--json", *wanted, "--precisions", *options.precisions]
    environment = os.environ | {"PYTHONPATH": str(Path(tree).resolve())}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {name: (pair[0], pair[1]) for name, pair in json.loads(done.stdout).items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="chatglm2-6b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trees", nargs="+", default=[])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", *PRECISIONS), default=PRECISIONS)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.json:
        print(json.dumps(measure(options)))
        return
    trees = options.trees or [str(Path(__file__).resolve().parents[1])]
    rounds = [[measure_tree(tree, options) for tree in trees] for _ in range(options.rounds)]
    print(f"| {options.shape}, ms a layer | " + " | ".join(trees) + " |\n| --- |" + " --- |" * len(trees))
    for precision in options.precisions:
        for index, kind in enumerate((f"prompt of {options.prompt}", "step of 1")):
            least = [min(each[i][precision][index] for each in rounds) for i in range(len(trees))]
            print(f"| {precision}, {kind} | " + " | ".join(f"{value:.2f}" for value in least) + " |")


if __name__ == "__main__":
    main()
