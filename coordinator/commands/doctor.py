"""`glmpipe doctor`: what this host has, and what is missing on it."""

import argparse
import platform
import subprocess
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version

from coordinator.errors import LaunchError
from coordinator.signals import signals_deferred
from coordinator.worker_command import facts_command, usable_cores, worker_environment
from glm.signals import undone_at_signals
from glm.weights_only import why_unsafe
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
    unsafe = why_unsafe(_version("torch"))
    if unsafe is not None:
        print(f"          note: no .bin weights are read, {unsafe}")
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
    with ExitStack() as stack:
        with signals_deferred():
            process = stack.enter_context(_started())
            stack.enter_context(undone_at_signals(process.kill))
        try:
            out, err = process.communicate(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise LaunchError(
                f"a worker process found nothing out in {_DEADLINE_S:.0f} s: is the disk or a GPU stuck?"
            ) from None
    if process.returncode:
        last = (err.strip().splitlines() or ["it said nothing"])[-1]
        raise LaunchError(f"a worker process cannot be started (exit code {process.returncode}): {last}")
    return out


def _started() -> "subprocess.Popen[str]":
    """In a process group of its own: Ctrl-C in a terminal is for this process."""
    command = facts_command()
    try:
        return subprocess.Popen(
            command,
            env=worker_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise LaunchError(f"{command[0]} cannot be started: {error.strerror}") from None
