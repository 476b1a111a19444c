"""`python -m stage_worker.facts`: what a worker finds on this host, line by line; `glmpipe doctor` shows it."""

import sys
from collections.abc import Iterator

import torch

from glm.kernels.cuda.kernels import CudaKernels, MissingKernels, cuda_kernels
from glm.kernels.diagnosis import native_state
from stage_worker.device import DeviceFacts, device_facts, why_no_gpu
from stage_worker.errors import DeviceError


def fact_lines() -> Iterator[str]:
    """One line a device, and what computes on it; why something is missing, where it is."""
    yield _line("cpu", _described(device_facts(torch.device("cpu"))))
    state = native_state()
    usable = f"{state.chosen}, of {', '.join(state.built)}" if state.chosen else "torch alone"
    yield _line("", f"kernels: {usable}")
    if state.complaint is not None:
        yield _line("", f"note: {state.complaint}")
    reason = why_no_gpu()
    if reason is not None:
        yield _line("cuda", f"no GPU: {reason}")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            major, minor = torch.cuda.get_device_capability(device)
            yield _line(str(device), f"{_described(device_facts(device))}, sm_{major}{minor}")
            yield _line("", _cuda_state(cuda_kernels(device, torch.float16)))
        except (DeviceError, RuntimeError) as error:
            yield _line(str(device), f"note: {error}")


def _cuda_state(kernels: CudaKernels | MissingKernels) -> str:
    if isinstance(kernels, CudaKernels):
        return "kernels: CUDA"
    return f"note: CUDA kernels for int8 and int4 are missing, torch computes instead, slower; {kernels.reason}"


def _described(facts: DeviceFacts) -> str:
    total, free = facts.memory_total_bytes / 1e9, facts.memory_free_bytes / 1e9
    return f"{facts.name}, {total:.1f} GB of memory, {free:.1f} GB free"


def _line(name: str, text: str) -> str:
    return f"{name:<9} {text}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    for line in fact_lines():
        print(line, flush=True)
