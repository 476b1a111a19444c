"""How long until a worker is ready, beside merely reading the same bytes; and how much memory that takes at most.

    python -m benchmarks.loading [--shape chatglm2-6b] [--layers 4] [--threads 2] [--turns 5] [--dir DIR] [--json]

Some layers of a shape are converted into a temporary directory (--dir names another disk; it needs their size twice).
Then, in turns, with everything in the page cache: the files are read plainly, in four ways, and a fresh process loads
them as a worker does. Reading:

    kept       read() of each file into new memory, as anything must that keeps the bytes
    mapped     each file is mapped and copied into new memory
    passing    read() into one small buffer, over and over: nothing is kept
    touched    each file is mapped and its bytes are looked at: nothing is copied

The readings run in one process, whose memory the system has seen before; a worker's is new to it.

Ready: from the assignment to a stage that can serve, config, manifest and checks included. Peaks are the kernel's
high-water marks of fresh processes, libraries included; beside them, the peak of quantising the same layers of a float
checkpoint when they are loaded, the first time (kept in a cache) and the second (found there).
"""

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from coordinator.progress import format_bytes
from glm.config import load_config
from glm.convert import convert
from glm.converted import file_name
from glm.kernels.native import best_kernels
from glm.layout import layer_unit, stored_shapes
from glm.precision import Precision
from glm.random_checkpoint import RandomCheckpoint
from glm.shapes import SHAPES

_BUFFER_BYTES = 1 << 20

# What a worker does with an assignment, without the wire: load_stage and what comes before its Ready.
_WORKER = """
import json, sys, time
from pathlib import Path
import torch
import stage_worker.process
from protocol.control import Assign
from stage_worker.loading import load_stage
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
where, precision, layers, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
before = status("VmRSS:")
assign = Assign(1, 1, 0, 1, where, None, "", 0, layers, precision, 4096, "ipc:///x", None, None, None, False)
started = time.perf_counter()
stage = load_stage(assign, torch.device("cpu"), lambda *_: None)
ready_s = time.perf_counter() - started
peak, held = status("VmHWM:"), status("VmRSS:")
print(json.dumps(dict(ready_s=ready_s, weight_bytes=stage.layers.weight_bytes, peak_bytes=peak, held_bytes=held,
    before_bytes=before)))
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One precision: medians of the turns; sizes in bytes."""

    precision: str
    file_bytes: int
    ready_s: float
    ready_fastest_s: float
    kept_s: float
    mapped_s: float
    passing_s: float
    touched_s: float
    weight_bytes: int
    library_bytes: int
    peak_bytes: int
    held_bytes: int
    quantise_s: float
    quantise_peak_bytes: int
    float_layer_bytes: int
    cached_s: float
    cached_peak_bytes: int


def read_kept(path: Path) -> None:
    """Into new memory."""
    with path.open("rb", buffering=0) as file:
        memory = torch.empty(path.stat().st_size, dtype=torch.uint8)
        view, done = memoryview(memory.numpy()), 0
        while done < len(view):
            done += file.readinto(view[done:])


def read_mapped(path: Path) -> None:
    """Mapped, then copied."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        torch.frombuffer(mapping, dtype=torch.uint8).clone()


def read_passing(path: Path) -> None:
    """Through a small buffer."""
    buffer = bytearray(_BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_touched(path: Path) -> None:
    """Mapped, every byte looked at by the kernels' threads (without kernels: summed by torch)."""
    kernels = best_kernels()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        words = torch.frombuffer(mapping, dtype=torch.int64, count=len(mapping) // 8)
        if kernels is None:
            words.sum()
        else:
            kernels.read(words)


READINGS: dict[str, Callable[[Path], None]] = {
    "kept": read_kept,
    "mapped": read_mapped,
    "passing": read_passing,
    "touched": read_touched,
}


@contextmanager
def made_models(shape: str, num_layers: int, precisions: list[str], where: Path | None) -> Iterator[dict[str, Path]]:
    """A float checkpoint of some layers, `float`, and one converted to each precision; removed in the end."""
    name = f"{shape}, {num_layers} layers"
    with tempfile.TemporaryDirectory(prefix="glmpipe-loading-", dir=where) as directory:
        models = {kind: Path(directory) / kind for kind in ("float", *precisions)}
        models["float"].mkdir()
        keys = {**SHAPES[shape], "num_layers": num_layers, "_name_or_path": name}
        (models["float"] / "config.json").write_text(json.dumps(keys))
        write_float(shape, models["float"])
        for precision in precisions:
            print(f"converting {name} to {precision}", file=sys.stderr, flush=True)
            convert(models["float"], models[precision], Precision(precision), Precision.INT8)
        yield models


def write_float(shape: str, model_dir: Path) -> None:
    """A shard a layer, as published models have about."""
    source, weight_map = RandomCheckpoint(Path(f"random:{shape}")), {}
    shapes = stored_shapes(load_config(model_dir))
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in shapes.items():
        words = name.split(".layers.")
        groups.setdefault(words[1].split(".")[0] if len(words) > 1 else "ends", {})[name] = size
    for group, wanted in groups.items():
        file = f"model-{group}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in source.read(wanted)}, model_dir / file)
        weight_map |= dict.fromkeys(wanted, file)
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def worker(model_dir: Path, precision: str, num_layers: int, threads: int, cache: Path | None = None) -> dict[str, Any]:
    """One load in a process of its own."""
    environment = {**os.environ, "GLMPIPE_CACHE": "off" if cache is None else "on", "GLMPIPE_CACHE_DIR": str(cache)}
    arguments = [sys.executable, "-c", _WORKER, str(model_dir), precision, str(num_layers), str(threads)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(models: dict[str, Path], precision: str, num_layers: int, threads: int, turns: int) -> Row:
    """Everything about one precision."""
    config = load_config(models[precision])
    files = [models[precision] / file_name(layer_unit(config, layer).name) for layer in range(num_layers)]
    seconds: dict[str, list[float]] = {kind: [] for kind in READINGS}
    loads = []
    for turn in range(turns + 1):
        for kind, read in READINGS.items():
            started_s = time.perf_counter()
            for path in files:
                read(path)
            seconds[kind].append(time.perf_counter() - started_s)
        loads.append(worker(models[precision], precision, num_layers, threads))
        if turn == 0:  # warms up
            loads.clear()
            seconds = {kind: [] for kind in READINGS}
    float_bytes = sum(path.stat().st_size for path in models["float"].glob("model-0.safetensors"))
    cache = models["float"].parent / f"cache-{precision}"
    first, second = (worker(models["float"], precision, num_layers, threads, cache) for _ in range(2))
    shutil.rmtree(cache, ignore_errors=True)  # small layers are not kept
    return Row(
        precision=precision,
        file_bytes=sum(path.stat().st_size for path in files),
        ready_s=median([load["ready_s"] for load in loads]),
        ready_fastest_s=min(load["ready_s"] for load in loads),
        **{f"{kind}_s": median(times) for kind, times in seconds.items()},
        weight_bytes=loads[0]["weight_bytes"],
        library_bytes=loads[0]["before_bytes"],
        peak_bytes=max(load["peak_bytes"] for load in loads),
        held_bytes=max(load["held_bytes"] for load in loads),
        quantise_s=first["ready_s"],
        quantise_peak_bytes=first["peak_bytes"],
        float_layer_bytes=float_bytes,
        cached_s=second["ready_s"],
        cached_peak_bytes=second["peak_bytes"],
    )


def median(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


def show(row: Row) -> None:
    """For people."""
    size = format_bytes
    ready_ms, fastest_ms = row.ready_s * 1e3, row.ready_fastest_s * 1e3
    print(f"{row.precision}: {size(row.file_bytes)}, ready in {ready_ms:.0f} ms, the fastest in {fastest_ms:.0f}")
    for kind in READINGS:
        read_s = getattr(row, f"{kind}_s")
        speed = row.file_bytes / read_s / 1e9
        print(f"  {kind:8} {read_s * 1e3:5.0f} ms, {speed:5.1f} GB/s, ready / read {row.ready_s / read_s:.2f}", end="")
        print(f", the fastest {row.ready_fastest_s / read_s:.2f}")
    bound = int(1.1 * row.weight_bytes + 400e6)
    print(
        f"  weights {size(row.weight_bytes)}, libraries before {size(row.library_bytes)}, held {size(row.held_bytes)}"
    )
    print(f"  peak {size(row.peak_bytes)} (1.1 x weights + 400 MB: {size(bound)})")
    bound = int(row.weight_bytes + 2 * row.float_layer_bytes + 400e6)
    print(f"  quantised at load in {row.quantise_s:.1f} s, peak {size(row.quantise_peak_bytes)}", end="")
    print(f" (weights + 2 float layers + 400 MB: {size(bound)})")
    print(f"  from the cache in {row.cached_s:.2f} s, peak {size(row.cached_peak_bytes)}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="chatglm2-6b", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8"], choices=("int4", "int8"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with made_models(options.shape, options.layers, options.precisions, options.dir) as models:
        for precision in options.precisions:
            row = measure(models, precision, options.layers, options.threads, options.turns)
            print(json.dumps(asdict(row)), flush=True) if options.json else show(row)


if __name__ == "__main__":
    main()
