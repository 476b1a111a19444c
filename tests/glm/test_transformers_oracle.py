"""The layouts `glm` and `glm4` equal transformers' own classes on tiny random models."""

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.model import Model

BOUND = 1e-4  # fp32, values of order one
SHORT = [5, 17, 40, 3, 77, 21, 64]
LONG = [(7 * i * i + 3 * i + 11) % 90 for i in range(100)]


@dataclass(frozen=True)
class Case:
    """A class of transformers, with the keys in which its tiny config differs from `BASE`."""

    family: str
    keys: dict[str, Any]
    shard_size: str = "1GB"


BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 160,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "eos_token_id": [94, 95],
    "pad_token_id": 94,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
CASES = {
    "glm": Case("glm", {"attention_bias": True}),
    "glm-sharded": Case("glm", {"attention_bias": True}, shard_size="60KB"),
    "glm-tied": Case("glm", {"attention_bias": True, "tie_word_embeddings": True}),
    "glm-wide-heads": Case("glm", {"attention_bias": True, "head_dim": 24, "num_attention_heads": 6}),
    "glm-no-bias": Case("glm", {"attention_bias": False}),
    "glm-whole-head-rotation": Case(
        "glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
    ),
    "glm-divided-positions": Case(
        "glm",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "factor": 3.0,
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "glm4": Case("glm4", {"attention_bias": True}),
    "glm4-z1-32b": Case(
        "glm4",
        {
            "hidden_size": 96,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 360,
            "attention_bias": False,
            "rms_norm_eps": 1e-5,
        },
        shard_size="200KB",
    ),
    "glm4-far-rotation": Case(
        "glm4", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.25}}
    ),
}


@dataclass(frozen=True)
class Pair:
    """The same weights as transformers' module and as the directory it saved."""

    case: Case
    theirs: Any
    model_dir: Path


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    case, model_dir = CASES[request.param], tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing transformers warns about things that are not ours
        import transformers
    prefix = {"glm": "Glm", "glm4": "Glm4"}[case.family]
    config = getattr(transformers, f"{prefix}Config")(**{**BASE, **case.keys})
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(config).eval().to(torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + noise / 10 if "norm" in name else noise / math.sqrt(parameter.shape[-1])
    theirs.save_pretrained(model_dir, max_shard_size=case.shard_size)
    return Pair(case, theirs, model_dir)


def load(model_dir: Path) -> Model:
    return Model.load(Checkpoint(model_dir), load_config(model_dir))


@torch.inference_mode()
def their_outputs(theirs: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """Output of each layer, of the final norm, and the logits."""
    found: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda _module, _inputs, output: found.update({name: output})

    modules = {f"layer {i}": layer for i, layer in enumerate(theirs.model.layers)} | {"norm": theirs.model.norm}
    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    found["logits"] = theirs(torch.tensor([ids]), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return {name: tensor[0] for name, tensor in found.items()}


def our_outputs(model: Model, ids: list[int]) -> dict[str, torch.Tensor]:
    layers: dict[int, torch.Tensor] = {}
    embedded = model.embedding.forward(torch.tensor(ids))
    hidden = model.layers.forward(embedded, [Segment(model.layers.new_cache(), 0, len(ids))], layers.__setitem__)
    norm = model.head.final_norm(hidden)
    return {f"layer {i}": output for i, output in layers.items()} | {"norm": norm, "logits": model.head.logits(norm)}


def their_greedy(theirs: Any, ids: list[int], num_new: int) -> list[int]:
    """By recomputing everything for each token, so that no cache of theirs is trusted."""
    ids = list(ids)
    for _ in range(num_new):
        ids.append(int(their_outputs(theirs, ids)["logits"][-1].argmax()))
    return ids[-num_new:]


@pytest.mark.parametrize("ids", [SHORT, LONG], ids=["short", "long"])
def test_every_layer_and_the_logits_are_equal(pair: Pair, ids: list[int]) -> None:
    """One prefill: output of each layer, final norm and logits at all positions."""
    theirs, ours = their_outputs(pair.theirs, ids), our_outputs(load(pair.model_dir), ids)
    assert theirs.keys() == ours.keys()
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, atol=BOUND, rtol=BOUND, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("ids", [SHORT, LONG], ids=["short", "long"])
def test_greedy_continuation_is_equal(pair: Pair, ids: list[int]) -> None:
    """Cached decoding here gives the ids of uncached decoding there."""
    assert load(pair.model_dir).greedy(ids, 12) == their_greedy(pair.theirs, ids, 12)


def test_rope_keys_are_read_in_both_styles(pair: Pair, tmp_path: Path) -> None:
    """config.json as transformers wrote it before 5.0 (rope keys at the top, torch_dtype) means the same."""
    raw = json.loads((pair.model_dir / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    old = {**raw, "rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    linear = {"type": "linear", "factor": rope["factor"]} if rope["rope_type"] == "linear" else None
    old |= {"rope_scaling": linear, "torch_dtype": old.pop("dtype")}
    for stored in pair.model_dir.iterdir():
        (tmp_path / stored.name).symlink_to(stored)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(old))
    new_config, old_config = load_config(pair.model_dir), load_config(tmp_path)
    assert old_config.rotary_scaling == new_config.rotary_scaling
    assert (old_config.rotary_base, old_config.rotary_dim) == (new_config.rotary_base, new_config.rotary_dim)
    assert torch.equal(our_outputs(load(tmp_path), SHORT)["logits"], our_outputs(load(pair.model_dir), SHORT)["logits"])


def test_the_saved_files_are_what_the_case_claims(pair: Pair) -> None:
    """A tied model stores no output projection; a small shard size gives several safetensors shards."""
    config, checkpoint = load_config(pair.model_dir), Checkpoint(pair.model_dir)
    shards = set(checkpoint.shard_of.values())
    assert ("lm_head.weight" in checkpoint) is not pair.case.keys.get("tie_word_embeddings", False)
    assert config.tied_ends is pair.case.keys.get("tie_word_embeddings", False)
    assert (len(shards) > 1) is (pair.case.shard_size != "1GB")
    assert {shard.suffix for shard in shards} == {".safetensors"}
