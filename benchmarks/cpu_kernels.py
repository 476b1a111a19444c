"""Speed of the linear layers on this CPU, beside what its memory and its arithmetic allow.

    python -m benchmarks.cpu_kernels [--kernels avx2 torch] [--precisions int4 bf16] [--threads 2] [--busy 1] [--json]

For each precision, shape of the 6B model and number of tokens: weight bytes per second over what merely reading as
many bytes takes, measured in turns with the same threads (the best of each), and FLOP/s beside torch's matmul of
4096 x 4096 x 4096 in fp32 and bf16. `--busy N` runs N processes beside it that never rest. The weights of every
measurement lie in memory, not in a cache: copies are used in turn.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from glm.kernels.memory import empty_weight
from glm.kernels.native import INSTRUCTION_SETS, NativeKernels, best_kernels, load_kernels
from glm.linear import Linear, make_linear
from glm.quantization import QuantizedWeight

SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696), (65024, 4096))
TOKENS = (1, 2, 4, 8, 16, 64, 512)
PRECISIONS = ("int4", "int8", "bf16")
COLD_BYTES = 160 << 20  # more than any last-level cache that a small machine has


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; `read_ratio` is 1 where a product costs what reading its weight costs."""

    precision: str
    path: str
    num_rows: int
    num_columns: int
    num_tokens: int
    product_s: float
    weight_bytes_per_s: float
    read_bytes_per_s: float
    read_ratio: float
    flops_per_s: float
    matmul_ratio: float


def make_weight(precision: str, num_rows: int, num_columns: int) -> torch.Tensor | QuantizedWeight:
    """A weight of random bits: products do not depend on the values."""
    if precision == "bf16":
        return empty_weight([num_rows, num_columns], torch.bfloat16).normal_()
    bits = int(precision.removeprefix("int"))
    values = torch.randint(-128, 128, (num_rows, num_columns * bits // 8), dtype=torch.int8)
    if bits == 8:
        return QuantizedWeight(values, torch.full((num_rows, 1), 0.01), bits)
    return QuantizedWeight(values, torch.full((num_rows, num_columns // 32), 0.01, dtype=torch.float16), bits)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(linears: list[Linear], memory: torch.Tensor, reader: NativeKernels, x: torch.Tensor) -> tuple[float, float]:
    """Fewest seconds of a product, and of reading as many bytes, in turns until half a second has gone by."""
    products, reads, started = [], [], time.perf_counter()
    part = memory[: linears[0].num_bytes]
    linears[0](x)
    while len(products) < 5 or (time.perf_counter() - started < 0.5 and len(products) < 200):
        linear = linears[len(products) % len(linears)]
        offset = len(reads) * part.numel() % (memory.numel() - part.numel() + 1) // 64 * 64
        products.append(seconds(lambda linear=linear: linear(x)))  # type: ignore[misc]
        reads.append(seconds(lambda at=offset: reader.read(memory[at : at + part.numel()])))  # type: ignore[misc]
    return min(products), min(reads)


def matmul_flops(dtype: torch.dtype) -> float:
    """FLOP/s of torch's matmul at 4096 cubed, the best of three."""
    a, b = (torch.randn(4096, 4096).to(dtype) for _ in range(2))
    return 2 * 4096**3 / min(seconds(lambda: a @ b.t()) for _ in range(3))


def rows(options: argparse.Namespace, reader: NativeKernels, best_flops: float) -> Iterator[Row]:
    memory = empty_weight([2 * max(COLD_BYTES, 65024 * 4096 * 2)], torch.uint8).fill_(1)
    for precision in options.precisions:
        for name in options.kernels:
            kernels = None if name == "torch" else load_kernels(name)
            for num_rows, num_columns in options.shapes:
                first = make_linear(make_weight(precision, num_rows, num_columns), None, kernels)
                copies = 1 + COLD_BYTES // first.num_bytes
                linears = [first] + [
                    make_linear(make_weight(precision, num_rows, num_columns), None, kernels) for _ in range(copies - 1)
                ]
                for num_tokens in options.tokens:
                    x = torch.randn(num_tokens, num_columns)
                    x = x.to(torch.bfloat16) if precision == "bf16" else x
                    product_s, read_s = measure(linears, memory, reader, x)
                    flops = 2 * num_tokens * num_rows * num_columns / product_s
                    yield Row(
                        precision,
                        first.path,
                        num_rows,
                        num_columns,
                        num_tokens,
                        product_s,
                        first.num_bytes / product_s,
                        first.num_bytes / read_s,
                        read_s / product_s,
                        flops,
                        flops / best_flops,
                    )


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Processes that use all of a core each, until the block is left."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def parse() -> argparse.Namespace:
    known = [name for name in INSTRUCTION_SETS if load_kernels(name) is not None]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=[*known, "torch"], default=[*known[:1], "torch"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxCOLUMNS", default=SHAPES, type=shape)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def shape(text: str) -> tuple[int, int]:
    """Raises ValueError for anything but ROWSxCOLUMNS."""
    num_rows, num_columns = text.split("x")
    return int(num_rows), int(num_columns)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    reader = best_kernels()
    if reader is None:
        sys.exit("no native kernels were built here: install a C++ compiler and glmpipe again")
    with busy_processes(options.busy):
        flops = {str(d).removeprefix("torch."): matmul_flops(d) for d in (torch.float32, torch.bfloat16)}
        if not options.json:
            print(", ".join(f"torch matmul {name}: {value / 1e9:.0f} GFLOP/s" for name, value in flops.items()) + "\n")
            print(
                "| precision | path | rows x columns | tokens | ms | GB/s | of reading | GFLOP/s | of the best matmul |"
            )
            print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        found = []
        for row in rows(options, reader, max(flops.values())):
            found.append(asdict(row))
            if not options.json:
                print(
                    f"| {row.precision} | {row.path} | {row.num_rows} x {row.num_columns} | {row.num_tokens} "
                    f"| {1e3 * row.product_s:.2f} | {row.weight_bytes_per_s / 1e9:.1f} | {row.read_ratio:.2f} "
                    f"| {row.flops_per_s / 1e9:.0f} | {row.matmul_ratio:.2f} |",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"threads": options.threads, "matmul_flops_per_s": flops, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
