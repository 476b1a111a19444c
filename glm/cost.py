"""What a model costs to compute, from its shape: pure arithmetic."""

import math

import torch

from glm.config import ModelConfig
from glm.layout import Source, Unit, layer_sources, lm_head_source
from glm.precision import Precision
from glm.quantization import group_size, scale_dtype


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """Multiplications and additions of feeding a prompt whole and scoring the token after it.

    The matrices of all layers for every token, attention over what each token sees, lm_head for the last token.
    """
    per_token = sum(_num_weights(config, layer) for layer in range(config.num_layers))
    pairs = num_tokens**2 if config.is_prefix_lm else num_tokens * (num_tokens + 1) // 2
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    lm_head = sum(math.prod(shape) for shape in lm_head_source(config).shapes.values())
    return 2 * (num_tokens * per_token + attention + lm_head)


def stored_bytes(unit: Unit, precision: Precision | None, dtype: torch.dtype) -> int:
    """Bytes of a unit with its matrices at a quantised precision, all else (with None everything) in `dtype`."""
    return sum(_source_bytes(source, precision, dtype) for source in unit.sources.values())


def kv_bytes_per_token(config: ModelConfig, num_layers: int, precision: Precision, device_type: str) -> int:
    """Bytes that one cached token takes in so many layers."""
    return 2 * num_layers * config.num_kv_heads * config.head_dim * _compute_bytes(precision, device_type)


def activation_bytes(config: ModelConfig, num_tokens: int, precision: Precision, device_type: str) -> int:
    """About what a layer holds at once besides weights and caches, for so many tokens in one step."""
    width = 4 * config.hidden_size + 2 * config.qkv_size + 3 * config.ffn_size
    return num_tokens * width * _compute_bytes(precision, device_type)


def _compute_bytes(precision: Precision, device_type: str) -> int:
    """Of one activation, as `precision.compute_dtype` chooses."""
    if precision.is_quantized:
        return 2 if device_type == "cuda" else 4
    return precision.bits // 8


def _source_bytes(source: Source, precision: Precision | None, dtype: torch.dtype) -> int:
    rows, columns = sum(source.num_rows), source.num_columns
    if columns is None or precision is None or not precision.is_quantized:
        return rows * (columns or 1) * dtype.itemsize
    num_groups = columns // group_size(precision.bits, columns)
    return rows * (columns * precision.bits // 8 + num_groups * scale_dtype(precision.bits).itemsize)


def _num_weights(config: ModelConfig, layer: int) -> int:
    """Elements of a layer's matrices."""
    shapes = (shape for source in layer_sources(config, layer).values() for shape in source.shapes.values())
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)
