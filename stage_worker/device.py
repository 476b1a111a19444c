"""What this worker's device is and has. For `cpu`, nothing here touches CUDA."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from glm.host_memory import host_memory
from stage_worker.errors import DeviceError


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """For people and the planner; memory as it was when asked."""

    name: str
    memory_total_bytes: int
    memory_free_bytes: int


def parse_device(text: str) -> torch.device:
    """`cpu` or `cuda:N` -> the device, usable.

    Raises:
        DeviceError: anything else; says which devices exist here.
    """
    if text == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda:(\d{1,4})", text)
    if match is None:
        raise DeviceError(f"device {text!r} is unknown: use cpu or cuda:N; {_existing()}")
    reason = why_no_gpu()
    if reason is not None:
        raise DeviceError(f"{text} cannot be used, {reason}; {_existing()}")
    if int(match[1]) >= torch.cuda.device_count():
        raise DeviceError(f"{text} does not exist; {_existing()}")
    return torch.device(text)


def why_no_gpu() -> str | None:
    """Why torch has no GPU here; None where it has."""
    if torch.cuda.is_available():
        return None
    return "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"


def device_facts(device: torch.device) -> DeviceFacts:
    """Name, total and free memory.

    Raises:
        DeviceError: the GPU is there but does not answer (busy in exclusive mode, broken driver).
    """
    if device.type == "cpu":
        total, free = host_memory()
        return DeviceFacts(_cpu_name(), total, free)
    try:
        free, total = torch.cuda.mem_get_info(device)
        return DeviceFacts(torch.cuda.get_device_name(device), total, free)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"{device} exists but cannot be used: {reason}") from None


def _existing() -> str:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(num_gpus)]
    return "devices of this host: " + ", ".join(["cpu", *gpus])


def _cpu_name() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()[:200]
    return platform.processor() or platform.machine() or "cpu"


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
