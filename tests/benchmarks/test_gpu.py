"""The benchmark for GPUs where there is none: that it says so, and its bookkeeping on emulated kernels."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from glm.precision import Precision
from tests.glm.kernels.cuda_emulation import COMPILER, emulated_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu() -> None:
    """One line and exit code 2."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("benchmarks.gpu needs an NVIDIA GPU: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(COMPILER is None, reason="no g++ here to build the emulation with")
def test_products(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every precision and way; errors of the arithmetic stay far below those of the precision; what crosses where."""

    def run_all(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
        for call in calls:
            call()
        return lambda: None

    monkeypatch.setattr(gpu, "MATRICES", ((10, 256),))
    monkeypatch.setattr(gpu, "COLD_BYTES", 12000)
    monkeypatch.setattr(gpu, "recorded", run_all)
    monkeypatch.setattr(gpu, "elapsed_s", lambda _: 1e-3)
    kernels = {dtype: emulated_kernels(tmp_path, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    options = argparse.Namespace(device="cpu", precisions=[p.value for p in Precision], tokens=(1, 9))
    found = list(gpu.products(options, kernels, bandwidth=1e9))
    assert len(found) == 3 * 2 + 2 * 3
    for row in found:
        assert row.arithmetic_error < (5e-3 if row.precision == "bf16" else 1e-3)
        if row.precision.startswith("int"):
            assert row.precision_error > 3 * row.arithmetic_error
            assert row.way in ("fused", "dequantise + matmul")
    expected = [f"{p}, 10 x 256: fused is the faster way for [1] tokens" for p in ("int8", "int4")]
    assert list(gpu.crossovers(found)) == expected
