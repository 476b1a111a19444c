"""`glmpipe doctor`: what this host has, and what is missing on it."""

import argparse
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from coordinator.errors import LaunchError
from coordinator.worker_command import facts_command, usable_cores, worker_environment
from protocol.version import VERSION

HELP = "say which devices, kernels and libraries are here, and what is missing"
EXAMPLES = """\
examples:
  glmpipe doctor                                               # good to have in a report of a problem
"""
_PACKAGES = ("torch", "pyzmq", "safetensors", "cpm_kernels")
_DEADLINE_S = 120.0


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace) -> int:  # noqa: ARG001 - every command has them
    """Print what is known here, and what a worker process finds."""
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    print(f"glmpipe   {VERSION}, Python {platform.python_version()} on {platform.platform(terse=True)}")
    print(f"packages  {packages}")
    print(f"hub       {_hub()}")
    print(f"threads   {usable_cores()}: the cores this process may use, and a stage's unless --threads says less")
    print(_worker_facts(), end="", flush=True)
    return 0


def _hub() -> str:
    """Where models of the form org/name come from, and the variables that choose."""
    from huggingface_hub import constants

    asked = "HF_HUB_OFFLINE is set: it is not asked" if constants.HF_HUB_OFFLINE else "asked for what is not there"
    return f"{constants.ENDPOINT} (HF_ENDPOINT), models in {constants.HF_HUB_CACHE} (HF_HOME); {asked}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _worker_facts() -> str:
    """What a worker process says. Raises LaunchError if none can be started."""
    try:
        done = subprocess.run(
            facts_command(),
            env=worker_environment(),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"a worker process found nothing out in {_DEADLINE_S:.0f} s: is the disk or a GPU stuck?"
        ) from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise LaunchError(f"a worker process cannot be started (exit code {done.returncode}): {last}")
    return done.stdout
