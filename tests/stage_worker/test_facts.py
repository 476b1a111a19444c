"""What a worker says of a host with a GPU, without one."""

import pytest
import torch

from glm.kernels.cuda.kernels import MissingKernels
from stage_worker import facts
from stage_worker.device import DeviceFacts


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes there, what is missing and what to do, a line each."""
    monkeypatch.setattr(facts, "why_no_gpu", lambda: None)
    monkeypatch.setattr(facts, "device_facts", lambda _: DeviceFacts("Some Card", 8 * 10**9, 7 * 10**9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    missing = MissingKernels("libnvrtc is missing: pip install nvidia-cuda-nvrtc-cu12")
    monkeypatch.setattr(facts, "cuda_kernels", lambda *_: missing)
    lines = list(facts.fact_lines())
    assert lines[-2] == "cuda:0    Some Card, 8.0 GB of memory, 7.0 GB free, sm_61"
    assert lines[-1].strip().startswith("note: CUDA kernels for int8 and int4 are missing")
    assert lines[-1].endswith("libnvrtc is missing: pip install nvidia-cuda-nvrtc-cu12")
