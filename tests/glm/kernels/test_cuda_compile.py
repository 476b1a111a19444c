"""NVIDIA's compilers accept kernels.cu for every kind of card, where they are installed; no card is needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from glm.errors import MissingKernelsError
from glm.kernels.cuda.cubins import compile_source
from glm.kernels.cuda.kernels import _ACTIVATIONS
from glm.kernels.cuda.libraries import compiler_layer
from tests.glm.kernels.cuda_emulation import DTYPES, SOURCE

ARCHITECTURES = ("sm_61", "sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

for_all_cards = pytest.mark.parametrize("architecture", ARCHITECTURES)


@for_all_cards
def test_nvrtc(architecture: str) -> None:
    """As at load: through cpm_kernels, with the library that is found."""
    try:
        nvrtc = compiler_layer()
    except MissingKernelsError as error:
        pytest.skip(str(error))
    number = int(architecture.removeprefix("sm_"))
    if (number < 75 and nvrtc.version >= (13, 0)) or (number >= 100 and nvrtc.version < (12, 8)):
        pytest.skip(f"NVRTC {nvrtc.version} does not know {architecture}")
    for dtype in DTYPES:
        options = (f"--gpu-architecture={architecture}", f"-DActivation={_ACTIVATIONS[dtype]}")
        assert b"product_grouped_int4_8" in compile_source(nvrtc, SOURCE.read_text(encoding="utf-8"), options)


@for_all_cards
def test_nvcc(architecture: str, tmp_path: Path) -> None:
    """No warning, and hardly a register spilled to memory."""
    if NVCC is None:
        pytest.skip("no nvcc here")
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    define = f"-DActivation={_ACTIVATIONS[torch.float16]}"
    options = ["-cubin", f"-arch={architecture}", define, "-Xptxas", "-v", "-o", str(tmp_path / "kernels.cubin")]
    done = subprocess.run([NVCC, *options, str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert spilled
    assert max(spilled) <= 16, done.stderr
