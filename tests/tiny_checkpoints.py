"""Small models with random weights in the published layouts, written where a test wants them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glm.config import ModelConfig, parse_config
from glm.layout import embedding_source, final_norm_sources, layer_sources, lm_head_source

CAUSAL: dict[str, Any] = {
    "model_type": "chatglm",
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 48,
    "padded_vocab_size": 96,
    "seq_length": 256,
    "add_qkv_bias": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
"""ChatGLM2-6B's keys."""

PREFIX: dict[str, Any] = {
    "model_type": "chatglm",
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "inner_hidden_size": 64,
    "vocab_size": 96,
    "bos_token_id": 94,
    "eos_token_id": 95,
    "pad_token_id": 3,
    "mask_token_id": 90,
    "gmask_token_id": 91,
    "torch_dtype": "float32",
}
"""ChatGLM-6B's keys."""


def write_checkpoint(
    model_dir: Path,
    keys: dict[str, Any] = CAUSAL,
    *,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 1,
    seed: int = 0,
    suffix: str = "safetensors",
) -> ModelConfig:
    """Write config.json and random weights (`suffix`: "safetensors" or "bin"); returns the parsed config.

    With several shards, layers are dealt out to them in turn, as the published ones are spread over files.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    config = parse_config(keys, name=model_dir.name)
    (model_dir / "config.json").write_text(json.dumps(keys))
    generator = torch.Generator().manual_seed(seed)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        tensors = _shard(config, number, num_shards, dtype, generator)
        name = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{number + 1:05}-of-{num_shards:05}.{suffix}"
        save_file(tensors, model_dir / name) if suffix == "safetensors" else torch.save(tensors, model_dir / name)
        weight_map |= dict.fromkeys(tensors, name)
    if num_shards > 1:
        (model_dir / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return config


def _shard(
    config: ModelConfig, number: int, num_shards: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    sources = [
        s for layer in range(number, config.num_layers, num_shards) for s in layer_sources(config, layer).values()
    ]
    if number == num_shards - 1:
        sources += [embedding_source(config), *final_norm_sources(config).values(), lm_head_source(config)]
    shapes = {name: shape for source in sources for name, shape in source.shapes.items()}
    return {name: _random(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep hidden states of order one: norms near one, matrices scaled by their width."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + values / 10 if "norm" in name and name.endswith("weight") else values / 10
    return values / shape[1] ** 0.5
