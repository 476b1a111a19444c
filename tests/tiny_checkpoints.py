"""Small models with random weights in the published layouts, written where a test wants them.

    config = write_checkpoint(tmp_path / "model", {**CAUSAL, "num_layers": 5}, suffix="bin", num_shards=2)

The published int8/int4 packing is written out here from its definition, independently of `glm.quantization`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glm.config import ModelConfig, parse_config
from glm.layout import embedding_source, lm_head_source, stored_shapes

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

NATIVE: dict[str, Any] = {
    "model_type": "glm",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 256,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "eos_token_id": [90, 91],
    "pad_token_id": 90,
    "torch_dtype": "float32",
}
"""glm-4-9b-chat-hf's keys: transformers' own layout."""

NATIVE4: dict[str, Any] = {**NATIVE, "model_type": "glm4", "attention_bias": False}
"""GLM-4-0414's keys."""

FAMILIES = {"chatglm": PREFIX, "chatglm2": CAUSAL, "glm": NATIVE, "glm4": NATIVE4}


def write_checkpoint(
    model_dir: Path,
    keys: dict[str, Any] = CAUSAL,
    *,
    num_shards: int = 1,
    seed: int = 0,
    suffix: str = "safetensors",
    legacy: bool = False,
    has_own_lm_head: bool = False,
) -> ModelConfig:
    """Write config.json and random weights (`suffix`: "safetensors" or "bin"); returns the parsed config.

    Weights have the config's dtype. With `quantization_bit` in the config the linear layers of the blocks are stored
    packed, as published; with `quantization_embeddings` both ends too. Several shards get equal numbers of tensors,
    which cuts layers in two as in the published models; one shard at a time is in memory. `legacy` writes the format
    that `.bin` files had before they were zip files. ChatGLM-6B's lm_head is the embedding stored once more;
    `has_own_lm_head` stores another one, of any tied model.
    """
    model_dir.mkdir(parents=True, exist_ok=True)
    config = parse_config(keys, name=model_dir.name)
    (model_dir / "config.json").write_text(json.dumps(keys))
    generator = torch.Generator().manual_seed(seed)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    table, head = embedding_source(config).names[0], lm_head_source(config)
    shapes = stored_shapes(config) | (head.shapes if has_own_lm_head else {})
    tied = None if has_own_lm_head or not config.tied_ends else torch.empty(0)
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        first, end = (len(shapes) * n // num_shards for n in (number, number + 1))
        tensors: dict[str, torch.Tensor] = {}
        for name in list(shapes)[first:end]:
            values = _random(name, shapes[name], generator)
            if tied is not None:
                tied = values if name == table else tied
                values = tied.clone() if name == head.names[0] else values
            tensors |= _stored(name, values, config)
        file_name = f"{stem}.{suffix}" if num_shards == 1 else f"{stem}-{number + 1:05}-of-{num_shards:05}.{suffix}"
        if suffix == "safetensors":
            save_file(tensors, model_dir / file_name)
        else:
            torch.save(tensors, model_dir / file_name, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(tensors, file_name)
    if num_shards > 1:
        (model_dir / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return config


def publish_quantized(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values int8 [rows, columns * bits / 8] and fp16 scales [rows] of a weight, as the publisher packs them."""
    scales = (weight.abs().amax(1) / (2 ** (bits - 1) - 1)).to(torch.float16)
    integers = (weight / scales.float().unsqueeze(1)).round().to(torch.int64)
    if bits == 4:
        integers = 16 * (integers[:, 0::2] % 16) + integers[:, 1::2] % 16
    return ((integers + 128) % 256 - 128).to(torch.int8), scales


def _stored(name: str, tensor: torch.Tensor, config: ModelConfig) -> dict[str, torch.Tensor]:
    at_an_end = "embed" in name or "lm_head" in name or "output_layer" in name
    if config.quantization_bits is None or tensor.dim() == 1 or (at_an_end and not config.quantized_ends):
        return {name: tensor.to(getattr(torch, config.stored_dtype))}
    values, scales = publish_quantized(tensor, config.quantization_bits)
    return {name: values, f"{name}_scale": scales}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep hidden states of order one: norms near one, matrices scaled by their width."""
    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return 1 + values / 10 if "norm" in name and name.endswith("weight") else values / 10
    return values / shape[1] ** 0.5
