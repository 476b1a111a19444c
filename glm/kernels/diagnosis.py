"""What became of the native CPU kernels on this machine, for people: which were built, which run, and what to do."""

from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from glm.kernels.native import INSTRUCTION_SETS, load_kernels

REMEDY = "install a C++ compiler (g++, clang++) and then glmpipe again (pip install --force-reinstall --no-deps .)"
_NEEDED = {"AVX512": "avx512", "AVX2": "avx2"}


@dataclass(frozen=True, slots=True)
class NativeState:
    """Names of `INSTRUCTION_SETS`, best first: those whose library is there, and those that this processor runs.

    `capability` is torch's word for the processor: AVX512, AVX2, or another one.
    """

    built: tuple[str, ...]
    usable: tuple[str, ...]
    capability: str

    @property
    def chosen(self) -> str | None:
        """The kernels that are used, None where torch does everything."""
        return self.usable[0] if self.usable else None

    @property
    def complaint(self) -> str | None:
        """Why int8, int4 and bf16 are slower on this CPU than they could be, and the remedy, in one line."""
        if not self.built:
            return f"the native CPU kernels were not built, torch computes instead, far slower; {REMEDY}"
        if not self.usable:
            return f"the native CPU kernels were built from other sources, torch computes instead, far slower; {REMEDY}"
        needed = _NEEDED.get(self.capability)
        if needed is not None and needed not in self.built:
            return f"the CPU has {needed.upper()}, but its native kernels were not built; {REMEDY}"
        if self.chosen == "portable" and len(self.built) > 1:
            return "the CPU lacks AVX2, which the fast native kernels need; another one, or a GPU, would be much faster"
        return None


def native_state() -> NativeState:
    """The state of this machine and this installation."""
    return NativeState(
        built=tuple(name for name in INSTRUCTION_SETS if _is_built(name)),
        usable=tuple(name for name in INSTRUCTION_SETS if load_kernels(name) is not None),
        capability=torch.backends.cpu.get_cpu_capability(),
    )


def _is_built(name: str) -> bool:
    return any(Path(__file__).with_name(f"_{name}{suffix}").is_file() for suffix in EXTENSION_SUFFIXES)
