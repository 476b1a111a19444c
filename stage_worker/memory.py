"""How much memory the worker holds, giving it back, and telling that there was not enough."""

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch


def resident_bytes(device: torch.device) -> int:
    """What this process occupies on its device: resident set on a CPU, memory reserved by torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def moved_bytes() -> int:
    """What this process and its children, which fetch a hub's model, have read and written so far.

    Mapped files are included; 0 where the system does not say.
    """
    return sum(map(_moved_by, (Path("/proc/self"), *_children())))


def _moved_by(process: Path) -> int:
    try:
        counts = dict(line.split(": ") for line in (process / "io").read_text(encoding="ascii").splitlines())
        return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))
    except (OSError, ValueError, KeyError):
        return 0


def _children() -> Iterator[Path]:
    """Those of every thread."""
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from (Path("/proc") / pid for pid in listed.read_text(encoding="ascii").split())


def return_memory(device: torch.device) -> None:
    """Give what Python and torch no longer use back to the system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory, of the host or of a GPU, did not suffice."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)
