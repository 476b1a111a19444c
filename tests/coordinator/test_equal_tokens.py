"""A request's tokens are those it gets alone, at every precision, whatever the engine does beside it."""

from pathlib import Path

import pytest

from glm.kernels.native import best_kernels
from glm.precision import Precision
from tests.golden import GoldenSet
from tests.in_process import in_process_engine, sequence_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(best_kernels() is None, reason="without native kernels torch's sums depend on company"),
]

RANGES = [(0, 2), (2, 5)]
LENGTH = 40
WAYS: dict[str, dict[str, object]] = {
    "together": {"prefill_chunk": 256},
    "cut prompts": {"prefill_chunk": 8},
    "drafts": {"speculate": True},
    "reuse": {"reuse": True},
    "all of it": {"prefill_chunk": 8, "speculate": True, "reuse": True},
}


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
def test_a_request_gets_the_tokens_it_gets_alone(family: str, precision: Precision, shared_dir: Path) -> None:
    """Greedy and seeded: three in one step, prompts in pieces, drafts, what others left, fed again."""
    golden = GoldenSet(shared_dir, family)
    rows = [row for row in golden.rows() if row.case in ("short", "long")]
    prompts = [list(row.token_ids) for row in rows] + [list(rows[0].token_ids)]

    def tokens(at_once: bool, **settings: object) -> list[list[int]]:
        plain = {"speculate": False, "reuse": False}
        engine, _, config = in_process_engine(golden.checkpoint_dir, RANGES, precision=precision, **plain | settings)
        sequences = []
        for seed, prompt in enumerate(prompts):
            hot = {"greedy": False, "temperature": 0.8, "seed": seed} if seed == 2 else {}
            sequences.append(sequence_for(engine, config, prompt, LENGTH, **hot))
            sequences[-1].draft_length.choose = lambda *_: 4  # type: ignore[method-assign] # whatever is measured
            while not at_once and not engine.is_idle:
                engine.step()
        while not engine.is_idle:
            engine.step()
        return [sequence.new_ids for sequence in sequences]

    alone = tokens(at_once=False)
    assert all(len(ids) == LENGTH for ids in alone)
    scarce = {"kv_budget_tokens": max(map(len, prompts)) + LENGTH + 10, "speculate": False}
    for way, settings in {**WAYS, "set back for want of room, and fed again": scarce}.items():
        assert tokens(at_once=True, **settings) == alone, way
