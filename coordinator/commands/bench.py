"""`glmpipe bench`: how fast, and how near to what the machine can do."""

import argparse
import dataclasses
import json
import sys

from coordinator.commands.options import (
    add_model_options,
    add_placement_options,
    add_watching_options,
    plan_request,
)
from coordinator.commands.session import check_watch, launched, watched
from coordinator.errors import UsageError
from coordinator.limits import MAX_KV_TOKENS
from coordinator.plan import CPU_PRECISIONS, MAX_NUM_SEQS, is_gpu
from coordinator.plan_request import Option, PlanRequest

HELP = "measure prefill and decode speed, and hold them against what the machine can do"
EXAMPLES = """\
examples:
  glmpipe bench --shape chatglm2-6b --precision int4           # random weights, nothing to download
  glmpipe bench --shape glm-4-9b --precision int8 --stages 2 --streams 8 --new-tokens 32
  glmpipe bench --model THUDM/chatglm-6b --layers cuda:0=1-28 --precision int8 --json
  glmpipe bench --shape tiny                                   # a few seconds, to see what it prints

decode efficiency: bytes of weights read in a step, times steps a second, over the measured read bandwidth
prefill efficiency: the model's operations a second over those of a 4096-cubed matmul in its best dtype

With --streams, all prompts are fed first, then all answers go on together; tokens/s count all streams. Before what is
timed go a prompt of the same length, one round of decoding, and, with several streams, rounds in which the engine tries
how many steps to have in flight (--steps-in-flight N settles that). Speculation and reuse of prefixes are off.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from glm.shapes import SHAPES

    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--shape", metavar="NAME", choices=tuple(SHAPES), help=f"random weights of a shape: {', '.join(SHAPES)}"
    )
    group.add_argument(
        "--precision",
        metavar="P",
        help="of all layers, wherever they are, and of lm_head as chats do it (default: the devices' own)",
    )
    group.add_argument("--prompt-tokens", metavar="N", type=int, default=512, help="of each stream (default 512)")
    group.add_argument("--new-tokens", metavar="N", type=int, default=64, help="of each stream, timed (default 64)")
    group.add_argument("--streams", metavar="N", type=int, default=1, help="sequences at once (default 1)")
    group.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    add_model_options(parser)
    add_placement_options(parser)
    add_watching_options(parser, can_watch=", at the cost of what drawing takes from what is measured")
    parser.set_defaults(no_speculation=True, no_prefix_reuse=True)  # every token of every prompt and answer is computed


def run(options: argparse.Namespace) -> int:
    """Launch, measure, print."""
    _check(options)
    check_watch(options)
    if options.shape is not None:
        options.model = f"random:{options.shape}"
    import torch

    from coordinator.bench import check_workload, kv_tokens, run_bench
    from coordinator.bench_report import Workload
    from coordinator.bench_view import progress_on, show
    from coordinator.worker_command import usable_cores

    workload = Workload(options.prompt_tokens, options.new_tokens, options.streams)
    request = _request(options, kv_tokens(workload))
    torch.set_num_threads(request.num_threads or usable_cores())
    with (
        launched(
            options, request, check=lambda chosen: check_workload(workload, chosen.config), wanted="token ids"
        ) as chat_model,
        watched(options, chat_model) as panel,
        progress_on(sys.stderr, panel) as report,
    ):
        torch.set_num_threads(max(s.num_threads or usable_cores() for s in chat_model.cluster.plan.stages))
        result = run_bench(chat_model, workload, report)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)), flush=True)
    else:
        show(result, sys.stdout)
    return 0


def _check(options: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "new_tokens", "streams"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)} must be 1 or more")
    if options.shape is not None and options.model is not None:
        raise UsageError(f"--shape {options.shape} and --model {options.model} are both given; measure one model")
    if options.precision is not None:
        others = [name for name in ("cpu_precision", "gpu_precision", "plan") if getattr(options, name) is not None]
        if others:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise UsageError(f"--precision {options.precision} and {names} are both given; say it in one place")


def _request(options: argparse.Namespace, kv_budget_tokens: int) -> PlanRequest:
    """The placement that was asked for, with `--precision` for all layers, and room for the streams and their KV."""
    request = plan_request(options)
    if request.max_num_seqs is None:
        request = dataclasses.replace(request, max_num_seqs=max(MAX_NUM_SEQS, options.streams))
    if request.kv_budget_tokens is None and request.kv_budget is None:
        request = dataclasses.replace(request, kv_budget_tokens=min(kv_budget_tokens, MAX_KV_TOKENS))
    if options.precision is None:
        return request
    precision = Option("--precision", options.precision)
    devices = [stage.device for stage in request.stages] or ["cpu"]
    has_gpu, has_cpu = any(map(is_gpu, devices)), not all(map(is_gpu, devices))
    is_for_cpu = has_cpu or options.precision in CPU_PRECISIONS  # else a mistake only where layers are on the CPU
    return dataclasses.replace(
        request,
        cpu_precision=precision if is_for_cpu else None,
        gpu_precision=precision if has_gpu else None,
    )
