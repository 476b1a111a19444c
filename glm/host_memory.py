"""How much memory this process may still take of its host: as much as there is, or as its container leaves it."""

import os
from pathlib import Path

_ROOT = Path("/")
_RECLAIMABLE = ("active_file", "inactive_file")  # page cache: counted as used, given up when it is needed


def host_memory(root: Path = _ROOT) -> tuple[int, int]:
    """Total and available bytes. `root` is where the file system with /proc and /sys begins, for tests.

    A limit may be set on any of the control groups that contain this process, in either version of them.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts = _pairs(root / "proc/meminfo", unit=1024)
    total = facts.get("MemTotal:", total)
    available = min(total, facts.get("MemAvailable:", total))
    for limit, left in _group_limits(root):
        total, available = min(total, limit), min(available, left)
    return total, available


def num_oom_kills(root: Path = _ROOT) -> int | None:
    """How many processes this system has killed for want of memory since it began; None where it does not say."""
    return _pairs(root / "proc/vmstat").get("oom_kill")


def _group_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, what is left of it) of every control group with a limit that this process is in."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = base / path.strip("/") if ".." not in path.split("/") else base
        # In a container the path may be the host's, and only the base is to be seen.
        for directory in {group, *(parent for parent in group.parents if parent.is_relative_to(base)), base}:
            limit, used = (_number(directory / name) for name in names[:2])
            if limit is not None and used is not None:
                cached = _pairs(directory / "memory.stat")
                used -= sum(cached.get(names[2] + name, 0) for name in _RECLAIMABLE)
                found.append((limit, max(0, limit - max(0, used))))
    return found


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _pairs(path: Path, unit: int = 1) -> dict[str, int]:
    words = [line.split() for line in _lines(path)]
    return {pair[0]: int(pair[1]) * unit for pair in words if len(pair) >= 2 and pair[1].isdigit()}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
