"""Error and speed of every precision on a GPU, beside what the card's memory allows.

    python -m benchmarks.gpu [--device cuda:0] [--shape chatglm2-6b] [--precisions int8 int4] [--only linears] [--json]

Linear layers: for each precision, matrix of the 6B model and number of tokens, the time of a product, its bytes of
weight a second over what a copy from memory to memory moves (read and written bytes together), and two errors
(relative rms): of the arithmetic, against the same weights in fp64, and of the precision, against the float weights
that it was made of. Weights are not in a cache: copies are used in turn. Calls are recorded in a CUDA graph, so that
what is timed is the card and not Python. For int8 and int4 both ways are timed, to find the number of tokens up to
which reading the weight once, fused, is the faster one.

Pipelines: `glmpipe bench` with real workers, all layers in one stage and in two stages on the same card.

Without a GPU it says so and exits with 2.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from glm.config import load_config
from glm.kernels.cuda.kernels import MOST_FUSED_TOKENS, CudaKernels, MissingKernels, cuda_kernels
from glm.linear import CudaLinear, Linear, make_linear, make_weight
from glm.precision import Precision, sum_in_fp32
from glm.shapes import SHAPES

MATRICES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696), (65024, 4096))
TOKENS = (1, 2, 4, 8, 16, 64, 512)
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}  # of activations; fp16 for all others
COLD_BYTES = 512 << 20  # more than any card's cache
COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Product:
    """One way to multiply, timed; `efficiency` is 1 where it costs what copying as many bytes would."""

    precision: str
    way: str
    num_rows: int
    num_columns: int
    num_tokens: int
    product_s: float
    weight_bytes_per_s: float
    efficiency: float
    flops_per_s: float
    arithmetic_error: float
    precision_error: float


def elapsed_s(run: Callable[[], object], repeats: int = 20) -> float:
    """Seconds of one run on the card: the median of several, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(sorted(times[2:])[repeats // 2])


def recorded(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All calls, one after the other, as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the card's memory reads and writes."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / elapsed_s(lambda: target.copy_(source))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Rms of the difference over that of what is wanted."""
    return float((found.double() - wanted).norm() / wanted.norm())


def ways(linear: Linear, num_tokens: int) -> Iterator[tuple[str, Callable[[Any, torch.Tensor], torch.Tensor]]]:
    """How a layer can multiply so many tokens, with names."""
    if not isinstance(linear, CudaLinear):
        yield linear.path, lambda layer, x: layer(x)
        return
    if num_tokens <= MOST_FUSED_TOKENS:
        yield "fused", lambda layer, x: layer.kernels.product(x, layer.weight)
    yield "dequantise + matmul", lambda layer, x: layer.kernels.product_by_blocks(x, layer.weight)


def products(
    options: argparse.Namespace, kernels: dict[torch.dtype, CudaKernels | MissingKernels], bandwidth: float
) -> Iterator[Product]:
    """Every measurement of linear layers."""
    device = torch.device(options.device)
    for precision in map(Precision, options.precisions):
        dtype = DTYPES.get(precision, torch.float16)
        for num_rows, num_columns in MATRICES:
            exact = torch.randn(num_rows, num_columns, device=device) / num_columns**0.5
            layers = [make_linear(make_weight(exact, precision, dtype, device), None, kernels[dtype])]
            while len(layers) * layers[0].num_bytes < COLD_BYTES:
                layers.append(make_linear(make_weight(exact, precision, dtype, device), None, kernels[dtype]))
            for num_tokens in options.tokens:
                x = torch.randn(num_tokens, num_columns, device=device).to(dtype)
                yield from _timed(precision, layers, exact, x, bandwidth)


def _timed(
    precision: Precision, layers: list[Linear], exact: torch.Tensor, x: torch.Tensor, bandwidth: float
) -> Iterator[Product]:
    wide = x.double()
    ideal, held = wide @ exact.double().t(), wide @ _held(layers[0]).t()
    for name, way in ways(layers[0], len(x)):
        found = way(layers[0], x)
        once_s = elapsed_s(recorded([partial(way, layer, x) for layer in layers])) / len(layers)
        yield Product(
            precision.value,
            name,
            exact.shape[0],
            exact.shape[1],
            len(x),
            once_s,
            layers[0].num_bytes / once_s,
            layers[0].num_bytes / once_s / bandwidth,
            2 * len(x) * exact.numel() / once_s,
            relative_error(found, held),
            relative_error(found, ideal),
        )


def _held(layer: Linear) -> torch.Tensor:
    """The weights that a layer computes with, in fp64."""
    held: Any = layer
    weight = held.weight.weight if isinstance(held, CudaLinear) else held.weight
    return weight.double() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float64)


def crossovers(found: Sequence[Product]) -> Iterator[str]:
    """For each precision and matrix, up to how many tokens one fused pass was the faster way."""
    fused = [row for row in found if row.way == "fused"]
    apart = {
        (row.precision, row.num_rows, row.num_columns, row.num_tokens): row.product_s
        for row in found
        if row.way == "dequantise + matmul"
    }
    for (precision, num_rows, num_columns), group in groupby(
        fused, key=lambda row: (row.precision, row.num_rows, row.num_columns)
    ):
        won = [
            row.num_tokens for row in group if row.product_s <= apart[precision, num_rows, num_columns, row.num_tokens]
        ]
        yield f"{precision}, {num_rows} x {num_columns}: fused is the faster way for {won or 'no number of'} tokens"


def pipelines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """`glmpipe bench` in one stage and in two on the same card, for each precision that fits."""
    num_layers = load_config(Path(f"random:{options.shape}")).num_layers
    half = num_layers // 2
    for precision in options.precisions:
        for cuts in (((1, num_layers),), ((1, half), (half + 1, num_layers))):
            layers = [word for a, b in cuts for word in ("--layers", f"{options.device}={a}-{b}")]
            workload = ["--prompt-tokens", "512", "--new-tokens", "64", "--lm-head", options.device, "--json"]
            command = [sys.executable, "-m", "coordinator", "bench", "--shape", options.shape]
            done = subprocess.run(
                [*command, "--precision", precision, *layers, *workload], capture_output=True, text=True, check=False
            )
            result: dict[str, Any] = {"precision": precision, "num_stages": len(cuts)}
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            yield result | (json.loads(done.stdout) if done.returncode == 0 else {"failed": last})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [precision.value for precision in Precision]
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="chatglm2-6b", help="of the pipelines")
    parser.add_argument("--precisions", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--only", choices=("linears", "pipelines"))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def show_linears(options: argparse.Namespace, report: dict[str, Any], say: Callable[[str], None]) -> None:
    """Measure the linear layers into the report, telling each line as it comes."""
    device = torch.device(options.device)
    kernels = {dtype: cuda_kernels(device, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    for reason in {k.reason for k in kernels.values() if isinstance(k, MissingKernels)}:
        say(f"CUDA kernels are missing, torch computes instead: {reason}")
    bandwidth = copy_bandwidth(device)
    report |= {"copy_bytes_per_s": bandwidth, "products": []}
    say(f"copy: {bandwidth / 1e9:.0f} GB/s, read and written bytes together\n")
    say("| precision | way | rows x columns | tokens | us | GB/s | of copying | TFLOP/s | arithmetic | precision |")
    say("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    found = []
    for row in products(options, kernels, bandwidth):
        found.append(row)
        say(
            f"| {row.precision} | {row.way} | {row.num_rows} x {row.num_columns} | {row.num_tokens} "
            f"| {1e6 * row.product_s:.1f} | {row.weight_bytes_per_s / 1e9:.0f} | {row.efficiency:.2f} "
            f"| {row.flops_per_s / 1e12:.1f} | {row.arithmetic_error:.1e} | {row.precision_error:.1e} |"
        )
    report["products"] = [asdict(row) for row in found]
    say("")
    for line in crossovers(found):
        say(line)


def show_pipelines(options: argparse.Namespace, report: dict[str, Any], say: Callable[[str], None]) -> None:
    """Measure the pipelines into the report, telling each line as it comes."""
    say("\n| precision | stages | prefill tokens/s | decode tokens/s | decode efficiency | kernels |")
    say("| --- | --- | --- | --- | --- | --- |")
    report["pipelines"] = []
    for run in pipelines(options):
        report["pipelines"].append(run)
        if "failed" in run:
            say(f"| {run['precision']} | {run['num_stages']} | | | | {run['failed']} |")
            continue
        say(
            f"| {run['precision']} | {run['num_stages']} | {run['prefill_tokens_per_s']:.0f} "
            f"| {run['decode_tokens_per_s']:.1f} | {run['decode_efficiency']:.2f} | {run['stages'][0]['kernel_path']} |"
        )


def main() -> int:
    options = parse()
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds none it can use"
        print(f"benchmarks.gpu needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    torch.cuda.set_device(options.device)
    sum_in_fp32()
    major, minor = torch.cuda.get_device_capability(options.device)
    name = torch.cuda.get_device_name(options.device)
    report: dict[str, Any] = {"device": name, "capability": f"sm_{major}{minor}", "torch": str(torch.__version__)}

    def say(line: str) -> None:
        if not options.json:
            print(line, flush=True)

    say(f"{name}, sm_{major}{minor}, torch {torch.__version__}")
    with torch.inference_mode():
        if options.only != "pipelines":
            show_linears(options, report, say)
    torch.cuda.empty_cache()
    if options.only != "linears":
        show_pipelines(options, report, say)
    if options.json:
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
