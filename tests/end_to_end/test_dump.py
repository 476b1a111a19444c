"""What a long prompt left in the stages: more than one control message holds."""

from pathlib import Path

import pytest
import torch

import coordinator
from coordinator.dump import dump
from coordinator.plan_request import PlanRequest
from glm.config import load_config
from protocol.limits import MAX_INSPECTED_BYTES
from tests.in_process import in_process_engine, sequence_for
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow
NUM_TOKENS = 2300
KEYS = {
    **CAUSAL,
    "num_layers": 2,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "ffn_hidden_size": 64,
    "seq_length": 4096,
}


def test_a_long_inspection_comes_in_pieces(tmp_path: Path) -> None:
    """Hidden states, keys and values of 2300 tokens from a worker process are those of a stage in this one."""
    write_checkpoint(tmp_path / "model", KEYS)
    config = load_config(tmp_path / "model")
    ids = [n % 90 for n in range(NUM_TOKENS)]
    assert NUM_TOKENS * config.hidden_size * 4 > MAX_INSPECTED_BYTES
    with coordinator.launch(tmp_path / "model", PlanRequest(num_threads=1), record_hidden_states=True) as chat_model:
        dumped = dump(chat_model, ids, tmp_path / "dump.safetensors")
    engine, pipeline, _ = in_process_engine(tmp_path / "model", [(0, 2)])
    sequence = sequence_for(engine, config, ids)
    assert torch.equal(dumped["layer.1.hidden"], engine.prefill(sequence))
    for layer in range(2):
        for what in ("key", "value"):
            held = pipeline.stages[0].inspect(sequence.sequence_id, layer, what)  # type: ignore[arg-type]
            assert torch.equal(dumped[f"layer.{layer}.{what}"], held)
