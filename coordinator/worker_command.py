"""How to start `stage_worker`: as a command, never by import."""

import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]


def worker_command() -> tuple[str, ...]:
    """The command that starts a stage worker, its own arguments to be appended.

    `-P` keeps the user's current directory off the import path: a file there called torch.py is not ours to run.
    """
    return (sys.executable, "-P", "-m", "stage_worker")


def facts_command() -> tuple[str, ...]:
    """The command that prints what a worker finds on this host, and leaves."""
    return (sys.executable, "-P", "-m", "stage_worker.facts")


def worker_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for `worker_command`: `stage_worker` is found wherever this package was found."""
    result = {**environment, "PYTHONUNBUFFERED": "1"}
    if _ROOT not in _installed_roots():
        others = environment.get("PYTHONPATH")
        result["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([others] if others else [])])
    return result


def usable_cores() -> int:
    """How many cores this process may keep busy: its CPU affinity, and the quota of its container if it has one."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        num_cores = min(num_cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return num_cores


def _installed_roots() -> set[Path]:
    """Where Python finds packages by itself."""
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE:
        names.append(site.getusersitepackages())
    return {Path(name).resolve() for name in names}
