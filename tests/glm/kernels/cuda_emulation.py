"""kernels.cu built by g++ and run on the CPU: fibers in place of a card's threads (cuda_on_cpu.h)."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

from glm.kernels.cuda.kernels import _ACTIVATIONS, CudaKernels

SOURCE = Path(__file__).parents[3] / "glm" / "kernels" / "cuda" / "kernels.cu"
COMPILER = shutil.which("g++")
DTYPES = tuple(_ACTIVATIONS)
FLAGS = ("-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", "-x", "c++")


def build(folder: Path, dtype: torch.dtype) -> Path:
    """A library with the kernels for one kind of activations; those of every kind may be loaded together."""
    assert COMPILER is not None
    library = folder / f"{_ACTIVATIONS[dtype]}.so"
    shim = Path(__file__).with_name("cuda_on_cpu.h")
    define = f"-DActivation={_ACTIVATIONS[dtype]}"
    subprocess.run([COMPILER, *FLAGS, define, "-include", str(shim), str(SOURCE), "-o", str(library)], check=True)
    return library


class EmulatedModule:
    """Runs a kernel at once; the order in which threads take turns is another at every launch."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.launched: list[str] = []

    def launch(self, name: str, num_blocks: int, num_threads: int, arguments: ctypes.Structure) -> None:
        order = len(self.launched)
        self.launched.append(name)
        status = getattr(self._library, name)(ctypes.byref(arguments), num_blocks, num_threads, order)
        assert status == 0, "threads wait for others in vain" if status == 1 else "wrong number of threads"


def emulated_kernels(folder: Path, dtype: torch.dtype) -> CudaKernels:
    return CudaKernels(EmulatedModule(build(folder, dtype)), torch.device("cpu"), dtype)
