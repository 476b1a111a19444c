"""What workers cost: both sides decode the same tokens, and the ratio is theirs."""

from pathlib import Path

import pytest

from benchmarks import pipeline_cost
from benchmarks.pipeline_cost import Divided, Undivided, figures
from coordinator.bench_streams import prompt_ids
from coordinator.chat_model import launch
from coordinator.plan_request import Option, PlanRequest
from glm.config import load_config


def test_both_sides_decode_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise they would not be doing the same work."""
    monkeypatch.setattr(pipeline_cost, "MODEL", "random:tiny")
    prompt = prompt_ids(load_config(Path("random:tiny")), 12, stream=0)
    undivided = Undivided("int8", prompt)
    undivided.begin()
    request = PlanRequest(
        num_stages=2, num_threads=1, cpu_precision=Option("", "int8"), lm_head_precision=Option("", "int8")
    )
    with launch("random:tiny", request, speculate=False) as chat_model:
        divided = Divided(chat_model, prompt)
        for _ in range(4):
            assert undivided.last_id == divided.last_id
            assert undivided.turn() > 0 and divided.turn() > 0


def test_slower_over_workers_is_a_ratio_below_one() -> None:
    """100 ms alone and 105 ms over workers miss the bound of 0.97."""
    *_, ratio = figures(2, [(0.1, 0.105), (0.2, 0.21), (0.1, 0.2)])
    assert (ratio.median, ratio.is_met) == (pytest.approx(0.952, abs=1e-3), False)
