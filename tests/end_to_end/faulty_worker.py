"""A stage worker with something wrong with it, for tests.

    python -m tests.end_to_end.faulty_worker FAULT STAGE MARKER [a worker's options]

The stage worker itself knows nothing of this: parts of it are replaced here before it runs, and imported no sooner.
Only the worker of STAGE (`stage-2`) is faulty, the others are as ever. MARKER is a file that the test makes when the
fault is to happen.
"""

import os
import signal
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

from stage_worker.cli import main as worker


def no_memory_to_load(marker: Path) -> None:
    """While the marker is there, loading takes more memory than there is."""
    import stage_worker.loading

    load = stage_worker.loading._load_layers

    def exhausted(*arguments: Any) -> Any:
        if marker.exists():
            raise MemoryError
        return load(*arguments)

    stage_worker.loading._load_layers = exhausted


def no_memory_in_a_step(marker: Path) -> None:
    """Each time the marker is there a step has no memory, in the middle of the layers, and the marker goes."""
    import torch

    from glm.model import LayerStack

    forward = LayerStack.forward

    def exhausted(self: Any, *arguments: Any) -> Any:
        hidden = forward(self, *arguments)
        if marker.exists():
            marker.unlink()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return hidden

    LayerStack.forward = exhausted  # type: ignore[method-assign]


def hangs_in_a_step(marker: Path) -> None:
    """A step that finds the marker takes it away and never ends; the worker goes on to answer what it is asked."""
    from glm.model import LayerStack

    forward = LayerStack.forward

    def endless(self: Any, *arguments: Any) -> Any:
        if marker.exists():
            marker.unlink()
            time.sleep(3600)
        return forward(self, *arguments)

    LayerStack.forward = endless  # type: ignore[method-assign]


def dies_while_loading(marker: Path) -> None:
    """Killed behind its first layer if the marker is there, which goes first: the next one lives."""
    from glm.model import LayerStack

    load = LayerStack.load

    def dying(*arguments: Any) -> Any:
        *first, progress = arguments

        def report(layers_done: int, *numbers: int) -> None:
            progress(layers_done, *numbers)
            if layers_done and marker.exists():
                marker.unlink()
                os.kill(os.getpid(), signal.SIGKILL)

        return load(*first, report)

    LayerStack.load = dying  # type: ignore[method-assign, assignment]


def hangs_while_loading(marker: Path) -> None:
    """Behind its first layer, if the marker is there, which goes first; it answers all the same."""
    from glm.model import LayerStack

    load = LayerStack.load

    def hanging(*arguments: Any) -> Any:
        *first, progress = arguments

        def report(layers_done: int, *numbers: int) -> None:
            progress(layers_done, *numbers)
            if layers_done and marker.exists():
                marker.unlink()
                time.sleep(3600)

        return load(*first, report)

    LayerStack.load = hanging  # type: ignore[method-assign, assignment]


def dies_once_marked(marker: Path) -> None:
    """Ends at once when somebody has made the marker: a device that is gone for good."""
    if marker.exists():
        print("cuda:1 has fallen off the bus", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def clock_jumps(_: Path) -> None:
    """The wall clock is an hour ahead, then an hour behind, each time that somebody looks."""
    real_s, jumps = time.time, cycle((0.0, 3600.0, -3600.0))
    time.time = lambda: real_s() + next(jumps)


FAULTS = {
    fault.__name__.replace("_", "-"): fault
    for fault in (
        no_memory_to_load,
        no_memory_in_a_step,
        hangs_in_a_step,
        dies_while_loading,
        hangs_while_loading,
        dies_once_marked,
        clock_jumps,
    )
}


def main() -> int:
    fault, stage, marker, *options = sys.argv[1:]
    if stage == options[options.index("--worker-id") + 1]:
        FAULTS[fault](Path(marker))
    return worker(options)


if __name__ == "__main__":
    sys.exit(main())
