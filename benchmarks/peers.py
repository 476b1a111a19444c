"""Speed beside llama.cpp's, on random weights of the ChatGLM2-6B shape, and beside what the machine can do.

    python -m benchmarks.peers                                       # ours alone: the roofline part
    python -m benchmarks.make_random_gguf int4.gguf --precision int4
    python -m benchmarks.peers --llama-cpp FOLDER --gguf-int4 int4.gguf [--gguf-int8 int8.gguf] [--json FILE]

FOLDER has llama-batched-bench and ggml-rpc-server (CMake: Release, GGML_NATIVE=ON, GGML_RPC=ON). Both sides take turns
with the same threads, `--rounds` times; ratios are those of one round. Ours is what `glmpipe bench` measures: real
workers, both ends, lm_head at the stages' precision; they stay loaded, asleep, while the other side has its turn.

Parts: `single`: a prompt of 512 tokens, then decode at that context. `streams`: decode of 8 sequences at once (or
each of `--streams 1 4 8 16`), 64 prompt tokens each. `stages`: two local stages, beside two local RPC servers.
`contention`: how much of its decode speed is left when another process takes all it gets of one core.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.comparison import Comparison, table
from benchmarks.cpu_kernels import busy_processes
from benchmarks.disturbance import disturbance
from benchmarks.llama_cpp import LlamaCpp, LlamaCppError, Speed
from coordinator.bench import measure, run_bench, warm_up
from coordinator.bench_report import Workload
from coordinator.chat_model import ChatModel, launch
from coordinator.plan_request import Option, PlanRequest

SINGLE = Workload(num_prompt_tokens=512, num_new_tokens=64, num_streams=1)
CONTENTION = Workload(num_prompt_tokens=16, num_new_tokens=16, num_streams=1)
MODEL = "random:chatglm2-6b"
PARTS = ("single", "streams", "contention", "stages")
PRECISIONS = ("int4", "int8", "bf16")
STREAMS_TARGETS = {8: 1.5}
"""Least ratio to the other side by number of sequences; of any other number it is 1."""

Round = dict[str, float]
"""Figures of one round by name; those of the other side end in `, theirs`."""


@contextmanager
def ours(precision: str, num_threads: int, num_stages: int, workloads: Sequence[Workload]) -> Iterator[ChatModel]:
    """Our side, loaded and warm."""
    wish = Option("--precisions", precision)
    budget = max(work.num_streams * work.tokens_per_stream for work in workloads)
    request = PlanRequest(
        num_stages=num_stages,
        num_threads=num_threads,
        kv_budget_tokens=2 * budget,
        cpu_precision=wish,
        lm_head_precision=wish,
    )
    say(f"{precision}: loading {num_stages} stage(s)")
    with launch(MODEL, request, speculate=False, reuse=False, steps_in_flight=1) as chat_model:
        for workload in workloads:
            warm_up(chat_model, workload, silent)
        yield chat_model


def single_round(model: ChatModel, peer: LlamaCpp | None) -> Round:
    """Prefill and decode of one sequence, and how near both come to the machine's limits."""
    report = run_bench(model, SINGLE, silent, warm=True)
    found = {
        "prefill": report.prefill_tokens_per_s,
        "decode": report.decode_tokens_per_s,
        "prefill efficiency": report.prefill_efficiency,
        "decode efficiency": report.decode_efficiency,
        "read bandwidth": report.read_bandwidth_bytes_per_s / 1e9,
        "matmul": report.matmul_flops_per_s / 1e9,
    }
    return found | theirs(peer, lambda llama: speed_of(llama, SINGLE))


def streams_round(counts: Sequence[int], model: ChatModel, peer: LlamaCpp | None) -> Round:
    """Decode of several sequences at once, for each of these numbers of them."""
    found: Round = {}
    for count in counts:
        name, work = f"decode of {count}", streams_of(count)
        found[name] = measure(model, work, silent).decode_tokens_per_s
        found |= theirs(peer, lambda llama, name=name, work=work: {name: speed_of(llama, work)["decode"]})  # type: ignore[misc]
    return found


def streams_of(count: int) -> Workload:
    """So many sequences at once."""
    return Workload(num_prompt_tokens=64, num_new_tokens=24, num_streams=count)


def contention_round(model: ChatModel, peer: LlamaCpp | None) -> Round:
    """Decode alone and beside one busy process."""
    found = {"alone": measure(model, CONTENTION, silent).decode_tokens_per_s}
    found |= theirs(peer, lambda llama: {"alone": speed_of(llama, CONTENTION)["decode"]})
    with busy_processes(1):
        found["beside"] = measure(model, CONTENTION, silent).decode_tokens_per_s
        found |= theirs(peer, lambda llama: {"beside": speed_of(llama, CONTENTION)["decode"]})
    return found


def stages_round(model: ChatModel, peer: LlamaCpp | None) -> Round:
    """Prefill and decode of one sequence over two stages."""
    measured = measure(model, SINGLE, silent)
    found = {"prefill": measured.prefill_tokens_per_s, "decode": measured.decode_tokens_per_s}

    def over_rpc(llama: LlamaCpp) -> Round:
        with llama.servers(len(model.cluster.plan.stages)) as servers:
            return speed_of(llama, SINGLE, servers)

    return found | theirs(peer, over_rpc)


def speed_of(llama: LlamaCpp, workload: Workload, servers: Sequence[str] = ()) -> Round:
    """The other side's figures for a workload."""
    speed: Speed = llama.speed(workload.num_prompt_tokens, workload.num_new_tokens, workload.num_streams, servers)
    return {"prefill": speed.prefill, "decode": speed.decode}


def theirs(peer: LlamaCpp | None, run: Callable[[LlamaCpp], Round]) -> Round:
    """The other side's figures of a round, under their names; none without the other side."""
    return {} if peer is None else {f"{name}, theirs": value for name, value in run(peer).items()}


Rounds = Callable[[ChatModel, LlamaCpp | None], Round]


def run_round(part: str, one_round: Rounds, model: ChatModel, peer: LlamaCpp | None) -> Round:
    """Both sides' turn of a part."""
    with disturbance() as others:
        found = one_round(model, peer)
    if others.cores is not None:
        found["others"] = others.cores
    say(f"{part}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def run(options: argparse.Namespace, precision: str, peer: LlamaCpp | None) -> dict[str, list[Round]]:
    """All rounds of all parts that were asked for, by part; a model is loaded once for the parts that can share it."""
    found: dict[str, list[Round]] = {}
    workloads = {
        "single": SINGLE,
        "streams": streams_of(max(options.streams)),
        "contention": CONTENTION,
        "stages": SINGLE,
    }
    rounds: dict[str, Rounds] = {
        "single": single_round,
        "streams": partial(streams_round, options.streams),
        "contention": contention_round,
        "stages": stages_round,
    }
    for num_stages in (1, 2):
        parts = [part for part in options.parts if (part == "stages") == (num_stages == 2)]
        if not parts:
            continue
        chosen = list(dict.fromkeys(workloads[part] for part in parts))
        with ours(precision, options.threads, num_stages, chosen) as model:
            for part in parts:
                found[part] = [run_round(part, rounds[part], model, peer) for _ in range(options.rounds)]
    return found


def comparisons(precision: str, found: dict[str, list[Round]]) -> list[Comparison]:
    """Rows of the table, from the rounds of each part."""

    def row(part: str, name: str, what: str, unit: str, target: float | None = None) -> Comparison | None:
        own, other = (_values(found, part, key) for key in (name, f"{name}, theirs"))
        return Comparison(precision, what, unit, own, other, target) if own else None

    speed = "tokens/s"
    rows = [
        row("single", "decode", "decode at context 512", speed, 1.05),
        row("single", "prefill", "prefill of 512", speed, 2.0),
        row("single", "decode efficiency", "decode, of reading the weights", "share", 0.85),
        row("single", "prefill efficiency", "prefill, of the best matmul", "share", 0.7),
        row("single", "read bandwidth", "reading memory", "GB/s"),
        row("single", "matmul", "torch's best matmul of 4096 cubed", "GFLOP/s"),
        *(
            row("streams", name, f"{name} sequences at once", speed, STREAMS_TARGETS.get(count, 1.0))
            for count, name in _stream_counts(found)
        ),
        row("stages", "decode", "two stages: decode at context 512", speed, 2.5),
        row("stages", "prefill", "two stages: prefill of 512", speed, 4.0),
        _per_round(precision, "two stages beside one: decode", found, ("stages", "decode"), ("single", "decode")),
        row("contention", "alone", "decode alone", speed),
        row("contention", "beside", "decode beside a busy process", speed),
        _per_round(precision, "left beside a busy process", found, ("contention", "beside"), ("contention", "alone")),
    ]
    others = tuple(figures["others"] for part in found.values() for figures in part if "others" in figures)
    if others:
        rows.append(Comparison(precision, "taken by other processes", "cores", others))
    return [line for line in rows if line is not None]


def _stream_counts(found: dict[str, list[Round]]) -> list[tuple[int, str]]:
    """The numbers of sequences that were decoded at once, and what their figures are called."""
    names = [name for name in found.get("streams", [{}])[0] if re.fullmatch(r"decode of \d+", name)]
    return [(int(name.split()[-1]), name) for name in names]


def _values(found: dict[str, list[Round]], part: str, name: str) -> tuple[float, ...]:
    """One figure of a part, of every round that has it."""
    return tuple(figures[name] for figures in found.get(part, ()) if name in figures)


def _per_round(
    precision: str, what: str, found: dict[str, list[Round]], over: tuple[str, str], under: tuple[str, str]
) -> Comparison | None:
    """One figure as a share of another, on both sides."""
    own, other = (
        tuple(
            a / b
            for a, b in zip(
                _values(found, over[0], over[1] + side), _values(found, under[0], under[1] + side), strict=False
            )
        )
        for side in ("", ", theirs")
    )
    return Comparison(precision, what, "share", own, other) if own else None


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def silent(what: str, done: int, total: int) -> None:
    """Takes progress and shows none."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", metavar="FOLDER", type=Path, help="where its programs are")
    for precision in ("int4", "int8", "bf16"):
        parser.add_argument(f"--gguf-{precision}", metavar="FILE", type=Path)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["int4", "int8"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--streams", nargs="+", type=int, default=[8], help="sequences at once, in the part of this name"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of either side")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure of every round")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads, *options.streams) < 1:
        parser.error("--rounds, --threads and --streams are 1 or more")
    given = [p for p in PRECISIONS if getattr(options, f"gguf_{p}") is not None]
    if given and options.llama_cpp is None:
        parser.error(f"--gguf-{given[0]} is for llama.cpp: say where that is with --llama-cpp")
    missing = [p for p in options.precisions if p in ("int4", "int8") and p not in given]
    if options.llama_cpp is not None and missing:
        parser.error(
            f"--gguf-{missing[0]} is missing: make one with python -m benchmarks.make_random_gguf "
            f"{missing[0]}.gguf --precision {missing[0]}"
        )
    return options


def peer_for(options: argparse.Namespace, precision: str) -> LlamaCpp | None:
    """The other side at a precision, where it was given. Raises LlamaCppError: it is not there."""
    gguf = getattr(options, f"gguf_{precision}")
    return None if gguf is None else LlamaCpp(options.llama_cpp, gguf, options.threads)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows: list[Comparison] = []
    raw: dict[str, dict[str, list[Round]]] = {}
    with ExitStack() as stack:
        if options.json is not None:
            stack.callback(lambda: options.json.write_text(_json(options, raw, rows), encoding="utf-8"))
        try:
            peers = {precision: peer_for(options, precision) for precision in options.precisions}
            for precision, peer in peers.items():
                raw[precision] = run(options, precision, peer)
                rows += comparisons(precision, raw[precision])
        except LlamaCppError as error:
            sys.exit(f"llama.cpp: {error}")
    print(table(rows, "llama.cpp"))


def _json(options: argparse.Namespace, raw: dict[str, dict[str, list[Round]]], rows: Sequence[Comparison]) -> str:
    found = {"threads": options.threads, "rounds": raw, "comparisons": [row.as_json() for row in rows]}
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    main()
