"""Every instruction set of the native kernels as a test's parameter: skipped, with a reason, where it cannot run."""

import pytest

from glm.kernels.diagnosis import native_state
from glm.kernels.native import INSTRUCTION_SETS, load_kernels


def _parameter(name: str) -> object:
    kernels = load_kernels(name)
    why = "this processor lacks it" if name in native_state().built else "it was not built here (no C++ compiler?)"
    marks = [pytest.mark.skip(reason=f"native kernels {name}: {why}")] if kernels is None else []
    return pytest.param(kernels, id=name, marks=marks)


KERNEL_PARAMETERS = [_parameter(name) for name in INSTRUCTION_SETS]
for_all_kernels = pytest.mark.parametrize("kernels", KERNEL_PARAMETERS)
