"""What this machine can do at best, measured: the two limits that a model's speed is held against."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_BUFFER_BYTES = 512 << 20
_MATRIX_SIZE = 4096
_PROBE_SIZE = 512
_BUDGET_S = 1.0
_MIN_RUNS = 3
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes a second read from memory, and operations a second of a large matmul in the dtype that suits it best."""

    read_bandwidth_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_dtype: str


def measure_roofline(device: torch.device) -> Roofline:
    """Both limits of a device; on a CPU those of as many threads as torch uses in this process.

    Takes some seconds, and 512 MiB.
    """
    flops, dtype = matmul_flops_per_s(device)
    return Roofline(read_bandwidth(device), flops, dtype)


def better(one: Roofline, other: Roofline) -> Roofline:
    """The higher of each limit: what is measured at another moment may have been disturbed, never helped."""
    matmul = max(one, other, key=lambda roofline: roofline.matmul_flops_per_s)
    bandwidth = max(one.read_bandwidth_bytes_per_s, other.read_bandwidth_bytes_per_s)
    return Roofline(bandwidth, matmul.matmul_flops_per_s, matmul.matmul_dtype)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of reading through a buffer much larger than any cache, the best of several passes."""
    buffer = torch.ones(_BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    return _BUFFER_BYTES / _best_s(buffer.sum, device)


def matmul_flops_per_s(device: torch.device) -> tuple[float, str]:
    """Operations a second of a 4096-cubed matmul in fp32 or bf16, whichever a small one shows to be faster."""
    dtype = min(_DTYPES, key=lambda candidate: _matmul_s(_PROBE_SIZE, candidate, device))
    seconds = _matmul_s(_MATRIX_SIZE, dtype, device)
    return 2 * _MATRIX_SIZE**3 / seconds, str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _matmul_s(size: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _best_s(lambda: torch.mm(left, right, out=out), device)


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of several runs, after one that does not count; about a second's worth of them."""
    _timed_s(run, device)
    found = [_timed_s(run, device)]
    while len(found) < _MIN_RUNS or sum(found) < _BUDGET_S:
        found.append(_timed_s(run, device))
    return min(found)


def _timed_s(run: Callable[[], object], device: torch.device) -> float:
    started_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
