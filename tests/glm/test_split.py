"""Rung 3: layer ranges chained in one process equal the undivided model bit for bit, for every split."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.ends import Embedding, Head, end_placement
from glm.kv_cache import SequenceCache
from glm.model import LayerStack
from glm.positions import prompt_layout
from glm.precision import Precision
from tests.golden import SETS, GoldenSet
from tests.tiny_checkpoints import FAMILIES, write_checkpoint

NUM_LAYERS = 5
CPU = torch.device("cpu")
PROMPTS = {"chatglm": [5, 6, 30, 91, 94, 7], "chatglm2": [5, 6, 7], "glm": [5, 6, 7, 8], "glm4": [5, 6, 7, 8]}
NUM_DECODED = 4

Trace = list[torch.Tensor]


class Ranges:
    """All contiguous ranges of one model's layers, each loaded on its own, and both ends."""

    def __init__(self, model_dir: Path, precision: Precision = Precision.FP32) -> None:
        self.config, checkpoint = load_config(model_dir), Checkpoint(model_dir)
        assert self.config.num_layers == NUM_LAYERS
        placement = end_placement(precision, CPU, self.config)
        self.embedding = Embedding.load(checkpoint, self.config, placement)
        self.head = Head.load(checkpoint, self.config, placement, placement)
        self.stacks = {
            (start, end): LayerStack.load(checkpoint, self.config, start, end, precision, CPU)
            for start, end in combinations(range(NUM_LAYERS + 1), 2)
        }

    def trace(self, cuts: Sequence[int], prompt_ids: list[int]) -> Trace:
        """Output of every layer and logits of a prefill and greedy decoding, through the ranges between the cuts."""
        stacks = [self.stacks[ends] for ends in pairwise((0, *cuts, NUM_LAYERS))]
        caches = [stack.new_cache() for stack in stacks]
        layout, found = prompt_layout(prompt_ids, self.config), []
        ids, start_pos = list(prompt_ids), 0
        for _ in range(1 + NUM_DECODED):
            hidden = self.embedding.forward(torch.tensor(ids[start_pos:]))
            for stack, cache in zip(stacks, caches, strict=True):
                segment = Segment(cache, start_pos, len(ids) - start_pos, layout)
                hidden = stack.forward(hidden, [segment], lambda _layer, output: found.append(output.clone()))
            found.append(self.head.forward(hidden))
            start_pos = len(ids)
            ids.append(int(found[-1][-1].argmax()))
        found.extend(part for cache, stack in zip(caches, stacks, strict=True) for part in kv_of(cache, stack))
        return found


def kv_of(cache: SequenceCache, stack: LayerStack) -> Iterator[torch.Tensor]:
    for layer in range(stack.end - stack.start):
        yield cache.key(layer)
        yield cache.value(layer)


def all_splits() -> Iterator[tuple[int, ...]]:
    for num_cuts in range(1, NUM_LAYERS):
        yield from combinations(range(1, NUM_LAYERS), num_cuts)


def check_all_splits(ranges: Ranges, prompt_ids: list[int]) -> None:
    undivided = ranges.trace((), prompt_ids)
    assert len(undivided) == (1 + NUM_DECODED) * (NUM_LAYERS + 1) + 2 * NUM_LAYERS
    splits = list(all_splits())
    assert len(splits) == 2 ** (NUM_LAYERS - 1) - 1
    for cuts in splits:
        divided = ranges.trace(cuts, prompt_ids)
        assert all(map(torch.equal, divided, undivided)), cuts
        assert len(divided) == len(undivided)


@pytest.mark.parametrize("name", [name for name in SETS if name not in ("chatglm-28l", "chatglm-int4-qe")])
def test_every_split_of_the_reference_models(name: str, shared_dir: Path) -> None:
    """Each five-layer set: outputs of all layers, logits, K and V, in prefill and decode, for all 15 splits."""
    golden = GoldenSet(shared_dir, name)
    prompt = next(row for row in golden.rows() if row.case == "short").token_ids
    check_all_splits(Ranges(golden.checkpoint_dir), list(prompt))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", Precision)
def test_every_split_at_every_precision(family: str, precision: Precision, tmp_path: Path) -> None:
    """All families, with hidden states handed on in the compute dtype of the precision."""
    key = "num_layers" if "num_layers" in FAMILIES[family] else "num_hidden_layers"
    write_checkpoint(tmp_path, {**FAMILIES[family], key: NUM_LAYERS}, num_shards=2)
    check_all_splits(Ranges(tmp_path, precision), PROMPTS[family])
