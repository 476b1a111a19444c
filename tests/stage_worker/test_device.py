"""A worker knows its device, and a CPU worker knows nothing of GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stage_worker.device import device_facts, parse_device
from stage_worker.errors import DeviceError
from stage_worker.memory import is_out_of_memory, resident_bytes, return_memory

ROOT = Path(__file__).resolve().parents[2]


def test_the_cpu_has_a_name_and_memory() -> None:
    """Total memory bounds free memory bounds nothing."""
    facts = device_facts(parse_device("cpu"))
    assert facts.name
    assert 0 < facts.memory_free_bytes <= facts.memory_total_bytes
    assert resident_bytes(torch.device("cpu")) < facts.memory_total_bytes


@pytest.mark.parametrize("text", ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CPU", "cuda:0,1", "mps"])
def test_misspelt_devices(text: str) -> None:
    """Anything but cpu and cuda:N names what may be said and what exists."""
    with pytest.raises(DeviceError, match=r"is unknown: use cpu or cuda:N; devices of this host: cpu"):
        parse_device(text)


def test_absent_gpus() -> None:
    """A GPU that is not there: why not, and what is there."""
    with pytest.raises(DeviceError, match=r"cuda:99.*devices of this host: cpu"):
        parse_device("cuda:99")


def test_a_cpu_worker_touches_no_gpu_and_imports_nothing_heavy() -> None:
    """Importing the worker and looking at the CPU initialises no CUDA and loads no library it does not need."""
    code = """
import sys
import torch
from stage_worker import process
from stage_worker.device import device_facts, parse_device
device_facts(parse_device("cpu"))
assert not torch.cuda.is_initialized()
heavy = {"transformers", "tokenizers", "sentencepiece", "tiktoken", "huggingface_hub", "rich", "prompt_toolkit"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)


def test_help_needs_no_torch() -> None:
    """The options can be read without waiting for torch."""
    code = "import sys, stage_worker.cli; assert 'torch' not in sys.modules and 'zmq' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)


def test_memory_comes_back() -> None:
    """What was dropped leaves the process."""
    cpu = torch.device("cpu")
    held = torch.ones(16 * 2**20)
    before = resident_bytes(cpu)
    del held
    return_memory(cpu)
    assert resident_bytes(cpu) < before - 50e6


def test_out_of_memory_is_recognised() -> None:
    """Too little memory, of the host or of a GPU, is told from other errors."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
