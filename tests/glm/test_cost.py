"""What a prefill costs, by hand and by torch's own count."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glm import weights
from glm.attention import Segment
from glm.config import load_config
from glm.cost import prefill_flops
from glm.model import Model
from glm.model_source import open_checkpoint


def test_the_6b_shape_by_hand() -> None:
    """Two operations for every weight and token, four for every pair of tokens and width; lm_head for one token."""
    config = load_config(Path("random:chatglm2-6b"))
    layer = 4096 * (4608 + 4096 + 3 * 13696)
    pairs = 512 * 513 // 2
    assert prefill_flops(config, 512) == 2 * 512 * 28 * layer + 4 * 28 * 4096 * pairs + 2 * 65024 * 4096
    prefix = load_config(Path("random:chatglm-6b"))
    assert prefill_flops(prefix, 2) - 2 * prefill_flops(prefix, 1) == 4 * 28 * 4096 * 2 - 2 * 130528 * 4096


def test_the_matrices_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, whose attention is next to nothing. Torch counts what itself does, so the native kernels are away."""
    monkeypatch.setattr(weights, "best_kernels", lambda: None)
    model = Path("random:tiny")
    whole = Model.load(open_checkpoint(model), load_config(model))
    segment = Segment(whole.layers.new_cache(), 0, 1, None)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        whole.head.forward(whole.layers.forward(whole.embedding.forward(torch.tensor([5])), [segment]))
    assert counter.get_total_flops() == pytest.approx(prefill_flops(whole.config, 1), rel=0.01)
