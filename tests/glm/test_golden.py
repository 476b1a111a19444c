"""Rung 1: every family's undivided model equals the outputs of the original implementation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.kernels.native import best_kernels
from glm.model import LayerStack, Model
from glm.positions import PromptLayout, prompt_layout, token_positions, visible_keys
from glm.precision import Precision
from tests.golden import CHUNKED_SETS, PREFIX_SETS, SETS, GoldenCase, GoldenSet


@pytest.fixture(scope="module", params=SETS)
def golden(request: pytest.FixtureRequest, shared_dir: Path) -> GoldenSet:
    return GoldenSet(shared_dir, request.param)


def load(golden: GoldenSet, precision: Precision = Precision.FP32) -> Model:
    return Model.load(Checkpoint(golden.checkpoint_dir), load_config(golden.checkpoint_dir), precision)


def layout_of(model: Model, golden: GoldenSet, row: GoldenCase) -> tuple[Model, PromptLayout | None]:
    """The layout a case asks for: two cases deviate from what the tokenizer's rule would give."""
    config = model.config
    if row.case.startswith("optional_1d"):
        config = replace(config, position_encoding_2d=False)
        layers = (0, config.num_layers, Precision.FP32, torch.device("cpu"))
        model.layers = LayerStack.load(Checkpoint(golden.checkpoint_dir), config, *layers)
    layout = prompt_layout(row.token_ids, config)
    if row.case == "mask_and_gmask_model_positions":
        layout = PromptLayout(layout.context_length, row.token_ids.index(config.gmask_id))
    return model, layout


def worst(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    assert actual.shape == wanted.shape
    return (actual.float() - wanted.float()).abs().max().item()


def check_row(model: Model, golden: GoldenSet, row: GoldenCase) -> None:
    model, layout = layout_of(model, golden, row)
    cache, num_tokens = model.layers.new_cache(), len(row.token_ids)
    embedded = model.embedding.forward(torch.tensor(row.token_ids))
    outputs: dict[int, torch.Tensor] = {}
    hidden = model.layers.forward(embedded, [Segment(cache, 0, num_tokens, layout)], outputs.__setitem__)
    normed = model.head.final_norm(hidden)
    at = row.positions
    found = {"embeddings": embedded[at], "final_norm": normed[at]}
    for layer, output in outputs.items():
        found[f"layers.{layer}.hidden"] = output[at]
        found[f"layers.{layer}.k"] = cache.key(layer)[at]
        found[f"layers.{layer}.v"] = cache.value(layer)[at]
    found["logits"] = model.head.logits(normed)[-len(row.tensors["logits"]) :]
    for name, wanted in row.tensors.items():
        if name != "greedy.logits":
            kind = "hidden" if name == "embeddings" else name.split(".")[-1]
            assert worst(found[name], wanted) <= golden.bound(kind), (row.case, row.row, name)
    if row.greedy_ids is not None:
        check_greedy(model, golden, row, found["logits"][-1:], cache, layout)


def check_greedy(model, golden, row, logits, cache, layout) -> None:  # type: ignore[no-untyped-def]
    """Decode one token at a time: the same ids, and the same logits at each step."""
    for step, wanted_id in enumerate(row.greedy_ids):
        assert worst(logits[0], row.tensors["greedy.logits"][step]) <= golden.bound("logits"), (row.case, step)
        assert int(logits.argmax()) == wanted_id, (row.case, row.row, step)
        hidden = model.embedding.forward(torch.tensor([wanted_id]))
        hidden = model.layers.forward(hidden, [Segment(cache, cache.length, 1, layout)])
        logits = model.head.forward(hidden)


def test_undivided_model_equals_the_original(golden: GoldenSet) -> None:
    """Embedding, every layer's output, K, V, final norm, logits and greedy ids, of every row of every case."""
    rows = list(golden.rows())
    assert rows
    for row in rows:
        check_row(load(golden) if row.case.startswith("optional") else load_once(golden), golden, row)


_models: dict[str, Model] = {}


def load_once(golden: GoldenSet) -> Model:
    if golden.name not in _models:
        _models[golden.name] = load(golden)
    return _models[golden.name]


@pytest.mark.parametrize("name", [s for s in SETS if "int" in s])
def test_published_quantised_weights_are_used_as_they_are(name: str, shared_dir: Path) -> None:
    """Packed int8/int4 weights stay packed at their own precision and still give the reference's logits and ids."""
    golden = GoldenSet(shared_dir, name)
    precision = Precision.INT8 if "int8" in name else Precision.INT4
    packed, dense = load(golden, precision), load_once(golden)
    assert packed.layers.weight_bytes < dense.layers.weight_bytes / (3 if precision is Precision.INT8 else 5)
    config = packed.config
    ends = (packed.embedding, packed.head) if config.quantized_ends else (dense.embedding, dense.head)
    model = Model(ends[0], packed.layers, ends[1])
    for row in golden.rows():
        check_row(model, golden, row)


def test_rows_of_a_batch_are_independent(golden: GoldenSet) -> None:
    """All rows of a left-padded batch as segments of one forward, no padding anywhere: each equals its reference."""
    model = load_once(golden)
    rows = [row for row in golden.rows() if "left_pad" in row.case]
    assert len(rows) > 1
    segments = [
        Segment(model.layers.new_cache(), 0, len(r.token_ids), prompt_layout(r.token_ids, model.config)) for r in rows
    ]
    embedded = model.embedding.forward(torch.tensor([i for r in rows for i in r.token_ids]))
    logits = model.head.forward(model.layers.forward(embedded, segments))
    for row, part in zip(rows, logits.split([len(r.token_ids) for r in rows]), strict=True):
        wanted = row.tensors["logits"]
        assert worst(part[-len(wanted) :], wanted) <= golden.bound("logits")


@pytest.mark.parametrize("golden", CHUNKED_SETS, indirect=True)
def test_chunked_prefill_equals_the_original(golden: GoldenSet) -> None:
    """A causal prompt in two forwards: logits of both, K and V of the whole cache (prefix LMs have no such case)."""
    tensors = golden.tensors
    model, cache = load_once(golden), load_once(golden).layers.new_cache()
    ids = tensors["chunked_prefill/input_ids"][0]
    first = int(tensors["chunked_prefill/first_chunk_len"])
    for part, name in ((ids[:first], "chunk1"), (ids[first:], "chunk2")):
        segment = Segment(cache, cache.length, len(part))
        hidden = model.layers.forward(model.embedding.forward(part), [segment])
        assert worst(model.head.forward(hidden), tensors[f"chunked_prefill/{name}.logits"][0]) <= golden.bound("logits")
    for layer in range(model.config.num_layers):
        assert worst(cache.key(layer), tensors[f"chunked_prefill/layers.{layer}.k"][0]) <= golden.bound("k")
        assert worst(cache.value(layer), tensors[f"chunked_prefill/layers.{layer}.v"][0]) <= golden.bound("v")


@pytest.mark.parametrize("golden", PREFIX_SETS, indirect=True)
def test_positions_and_masks_equal_the_original(golden: GoldenSet) -> None:
    """Position ids and visibility follow from a few integers exactly as the tokenizer's own code computes them."""
    model = load_once(golden)
    for row in golden.rows():
        _, layout = layout_of(load(golden) if "1d" in row.case else model, golden, row)
        num_pads = golden.tensors[f"{row.case}/input_ids"].shape[1] - len(row.token_ids)
        wanted = golden.tensors[f"{row.case}/position_ids"][row.row]
        found = token_positions(0, len(row.token_ids), layout)
        assert torch.equal(found if wanted.dim() == 2 else found[0], wanted[..., num_pads:])
        mask = golden.tensors.get(f"{row.case}/attention_mask")
        if mask is not None:
            visible = visible_keys(0, len(row.token_ids), layout)
            assert torch.equal(visible, ~mask[row.row, 0, num_pads:, num_pads:])


@pytest.mark.parametrize("split", [1, 4, 9])
def test_prefill_then_decode_equals_one_pass(golden: GoldenSet, split: int) -> None:
    """Rung 2: prefill of n then n+1, ... one by one gives the logits of one pass (generated part for a prefix LM), bit
    for bit where the native kernels add up."""
    model = load_once(golden)
    row = next(r for r in golden.rows() if r.case == "short")
    ids = [*row.token_ids, *row.greedy_ids[:8]]
    layout = prompt_layout(row.token_ids, model.config)
    first = len(row.token_ids) if layout else split
    whole = forward_pieces(model, ids, [len(ids)], layout)
    pieces = forward_pieces(model, ids, [first, *[1] * (len(ids) - first)], layout)
    assert worst(pieces, whole) <= (golden.bound("logits") if best_kernels() is None else 0)


def forward_pieces(model: Model, ids: list[int], sizes: list[int], layout: PromptLayout | None) -> torch.Tensor:
    cache, logits = model.layers.new_cache(), []
    for part in torch.tensor(ids).split(sizes):
        segment = Segment(cache, cache.length, len(part), layout)
        logits.append(model.head.forward(model.layers.forward(model.embedding.forward(part), [segment])))
    return torch.cat(logits)


POSITIONS_32K = (601, 603, 357, 205, 541, 297, 165, 220, 281, 551, 366)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.INT8])
def test_the_longer_chatglm2_divides_its_positions(precision: Precision, shared_dir: Path, tmp_path: Path) -> None:
    """The ids are those of transformers' Glm with the same weights and a linear factor of 16; native layers too."""
    for file in GoldenSet(shared_dir, "chatglm2-safetensors").checkpoint_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = Checkpoint(tmp_path).fingerprint()
    raw = json.loads((tmp_path / "config.json").read_text())
    longer = {**raw, "rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"}
    (tmp_path / "config.json").write_text(json.dumps(longer))
    greedy = Model.load(Checkpoint(tmp_path), load_config(tmp_path), precision).greedy(POSITIONS_32K, 12)
    assert greedy == [425, 431, 265, 73, 262, 273, 578, 223, 457, 506, 73, 457]
    divided = Checkpoint(tmp_path).fingerprint()
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/chatglm3-6b-32k"}')
    assert load_config(tmp_path).rotary_base == 160_000
    assert len({before, divided, Checkpoint(tmp_path).fingerprint()}) == 3  # two hosts would notice
