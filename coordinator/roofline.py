"""What this machine can do at best, measured: the two limits that a model's speed is held against."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from glm.kernels.memory import empty_weight
from glm.kernels.native import best_kernels

_BUFFER_BYTES = 512 << 20
_MATRIX_SIZE = 4096
_PROBE_SIZE = 512
_BUDGET_S = 1.0
_SETTLE_S = 0.02  # torch's threads look for more work for a while before they sleep, on cores that a stage needs
_MIN_RUNS = 3
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Roofline:
    """Bytes a second read from memory, and operations a second of a large matmul in the dtype that suits it best."""

    read_bandwidth_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_dtype: str


class MemoryReader:
    """Measures a device's read bandwidth at several moments; on a CPU that of as many threads as torch uses here.

    Memory shared with others may give twice as much in one second as in the next, so that the bandwidth of another
    moment says nothing about a step. Holds 512 MiB on the device, much more than any cache.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = [_BUFFER_BYTES // 4]
        is_cpu = device.type == "cpu"  # there it lies as weights do: small pages are read a fifth slower
        buffer = empty_weight(size, torch.float32) if is_cpu else torch.empty(size, device=device)
        self._halves = buffer.fill_(1).chunk(2)
        self._seconds: list[float] = []
        kernels = best_kernels() if is_cpu else None
        self._readers: list[Callable[[torch.Tensor], object]] = [torch.sum]
        if kernels is not None:
            self._readers.append(kernels.read)
        self._read_s(self._halves[0])

    def read(self) -> None:
        """Read both halves in every way at hand; the quickest counts."""
        self._seconds.append(min(self._read_s(half) for half in self._halves))
        if self._device.type == "cpu":
            time.sleep(_SETTLE_S)

    def _read_s(self, half: torch.Tensor) -> float:
        return min(_timed_s(partial(reader, half), self._device) for reader in self._readers)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Over all moments: as many bytes each, in the time of all together."""
        return len(self._seconds) * _BUFFER_BYTES / 2 / sum(self._seconds)


def matmul_flops_per_s(device: torch.device) -> tuple[float, str]:
    """Operations a second of a 4096-cubed matmul in fp32 or bf16, whichever a small one shows to be faster."""
    dtype = min(_DTYPES, key=lambda candidate: _matmul_s(_PROBE_SIZE, candidate, device, budget_s=_BUDGET_S / 4))
    seconds = _matmul_s(_MATRIX_SIZE, dtype, device, _BUDGET_S)
    return 2 * _MATRIX_SIZE**3 / seconds, str(dtype).removeprefix("torch.")


@torch.inference_mode()
def _matmul_s(size: int, dtype: torch.dtype, device: torch.device, budget_s: float) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return _best_s(lambda: torch.mm(left, right, out=out), device, budget_s)


def _best_s(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The fastest of several runs, after one that does not count; about `budget_s` of them."""
    _timed_s(run, device)
    found = [_timed_s(run, device)]
    while len(found) < _MIN_RUNS or sum(found) < budget_s:
        found.append(_timed_s(run, device))
    return min(found)


def _timed_s(run: Callable[[], object], device: torch.device) -> float:
    started_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
