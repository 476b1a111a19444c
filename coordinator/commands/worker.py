"""`glmpipe worker`: becomes a stage worker."""

import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from coordinator.worker_command import worker_command, worker_environment
from glm.signals import NUMBERS

HELP = "be one stage: join a coordinator and compute a range of layers"


def become_worker(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by `python -m stage_worker` with the same arguments."""
    command = [*worker_command(), *arguments]
    signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)  # one that comes now waits until the worker has its handlers
    os.execve(command[0], command, worker_environment())
