"""Loading takes the memory of what is kept, not of what the checkpoint holds."""

import re
from pathlib import Path

import pytest

from protocol.control import Ready
from tests.stage_worker.fake_coordinator import fake_coordinator
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

NUM_LAYERS = 10
KEYS = {
    **CAUSAL,
    "num_layers": NUM_LAYERS,
    "hidden_size": 1024,
    "kv_channels": 64,
    "num_attention_heads": 16,
    "ffn_hidden_size": 4096,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "stored", "precision"),
    [
        ("safetensors", "float32", "fp32"),
        ("safetensors", "float16", "int8"),
        ("bin", "float16", "fp32"),
        ("bin", "float32", "int4"),
    ],
)
def test_peak_memory_of_a_loading_worker(tmp_path: Path, suffix: str, stored: str, precision: str) -> None:
    """Peak resident memory stays below the worker's own weights + 2 layers as stored and held + 400 MB."""
    write_checkpoint(tmp_path, {**KEYS, "torch_dtype": stored}, suffix=suffix, num_shards=3)
    layer_bytes = (1024 * 1280 + 1024 * 1024 + 3 * 1024 * 4096) * (4 if stored == "float32" else 2)
    with fake_coordinator() as coordinator:
        worker = coordinator.spawn()
        coordinator.admit(worker)
        ready = worker.assign(tmp_path, 2, 7, precision=precision)
        assert isinstance(ready, Ready), ready
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    two_layers = 2 * max(layer_bytes, ready.weight_bytes // 5)
    assert peak < ready.weight_bytes + two_layers + 400e6
