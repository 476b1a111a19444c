"""How much of the machine other people's processes took while something was measured: Linux alone can tell."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01


@dataclass
class Disturbance:
    """Cores that others took, on average; None before the block has ended, and where the system does not tell."""

    cores: float | None = None


@contextmanager
def disturbance() -> Iterator[Disturbance]:
    """Count from here to the end of the block; this process and its children, live or reaped, are not others."""
    found = Disturbance()
    before, started_s = _others_s(), time.monotonic()
    yield found
    after = _others_s()
    if before is not None and after is not None:
        found.cores = max(0.0, after - before) / (time.monotonic() - started_s)


def machine_busy_s(stat: str) -> float:
    """Seconds that all processes of all users have run, from the text of /proc/stat."""
    user, nice, system = stat.splitlines()[0].split()[1:4]
    return (int(user) + int(nice) + int(system)) * _TICK_S


def process_s(stat: str) -> tuple[int, float]:
    """A process's parent and the seconds it has run with its reaped children, from the text of /proc/PID/stat."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15])) * _TICK_S


def _others_s() -> float | None:
    try:
        busy_s = machine_busy_s((PROC / "stat").read_text(encoding="ascii"))
    except OSError:
        return None
    own_s = sum(os.times()[:4])
    for path in PROC.glob("[0-9]*/stat"):
        try:
            parent, seconds = process_s(path.read_text(encoding="utf-8", errors="replace"))
        except OSError:  # it has just ended
            continue
        own_s += seconds if parent == os.getpid() else 0.0
    return busy_s - own_s
