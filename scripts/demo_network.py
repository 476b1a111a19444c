"""The demo model's network as its training needs it: whole sequences, gradients, straight-through int4 noise.

The network that serves lives in `glm/`; `train_demo.py` runs that one to check what came out of this one. Weights are a
dict under ChatGLM2's names, so that saving it is all the export there is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from glm.precision import Precision
from glm.quantization import quantize

NUM_LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 6, 192, 6, 2, 32, 512
PADDED_VOCAB, MAX_CONTEXT, EPS = 2048, 1024, 1e-5
IGNORED = -100  # a target that is not learnt

Weights = dict[str, Tensor]
BLOCK_LINEARS = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def new_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, std: float = 0.02) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * std

    weights = {"transformer.embedding.word_embeddings.weight": normal(PADDED_VOCAB, HIDDEN, 0.1)}
    qkv_rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    for layer in range(NUM_LAYERS):
        prefix = f"transformer.encoder.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(HIDDEN),
            prefix + "self_attention.query_key_value.weight": normal(qkv_rows, HIDDEN, HIDDEN**-0.5),
            prefix + "self_attention.query_key_value.bias": torch.zeros(qkv_rows),
            prefix + "self_attention.dense.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            prefix + "post_attention_layernorm.weight": torch.ones(HIDDEN),
            prefix + "mlp.dense_h_to_4h.weight": normal(2 * FFN, HIDDEN, HIDDEN**-0.5),
            prefix + "mlp.dense_4h_to_h.weight": normal(HIDDEN, FFN),
        }
    weights["transformer.encoder.final_layernorm.weight"] = torch.ones(HIDDEN)
    weights["transformer.output_layer.weight"] = normal(PADDED_VOCAB, HIDDEN)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def is_block_linear(name: str) -> bool:
    return name.endswith(".weight") and any(part in name for part in BLOCK_LINEARS)


def with_int4_noise(weights: Weights) -> Weights:
    """The same weights as `glm` holds them in int4; gradients pass straight through the rounding."""

    def rounded(weight: Tensor) -> Tensor:
        held = quantize(weight.detach(), Precision.INT4).dequantize(torch.float32)
        return weight + (held - weight.detach())

    return {name: rounded(weight) if is_block_linear(name) else weight for name, weight in weights.items()}


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first half of each head, interleaved pairs; [rows, length, heads, head_dim]."""
    half = HEAD_DIM // 2
    even, odd = states[..., :half:2], states[..., 1:half:2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
    return torch.cat((turned, states[..., half:]), -1)


def block(weights: Weights, prefix: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, length, _ = hidden.shape
    normed = F.rms_norm(hidden, (HIDDEN,), weights[prefix + "input_layernorm.weight"], EPS)
    name = prefix + "self_attention.query_key_value."
    fused = F.linear(normed, weights[name + "weight"], weights[name + "bias"]).view(rows, length, -1, HEAD_DIM)
    query, key, value = fused.split([HEADS, KV_HEADS, KV_HEADS], 2)
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    hidden = hidden + F.linear(
        mixed.transpose(1, 2).reshape(rows, length, -1), weights[prefix + "self_attention.dense.weight"]
    )
    normed = F.rms_norm(hidden, (HIDDEN,), weights[prefix + "post_attention_layernorm.weight"], EPS)
    gate, up = F.linear(normed, weights[prefix + "mlp.dense_h_to_4h.weight"]).chunk(2, -1)
    return hidden + F.linear(F.silu(gate) * up, weights[prefix + "mlp.dense_4h_to_h.weight"])


def final_states(weights: Weights, token_ids: Tensor) -> Tensor:
    """Normalised hidden states [rows, length, hidden] before the output layer; causal, positions from 0."""
    half = HEAD_DIM // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2) / half)
    angles = torch.arange(token_ids.shape[1])[:, None, None] * frequencies
    hidden = weights["transformer.embedding.word_embeddings.weight"][token_ids]
    for layer in range(NUM_LAYERS):
        hidden = block(weights, f"transformer.encoder.layers.{layer}.", hidden, angles.cos(), angles.sin())
    return F.rms_norm(hidden, (HIDDEN,), weights["transformer.encoder.final_layernorm.weight"], EPS)


def loss(weights: Weights, token_ids: Tensor, targets: Tensor) -> Tensor:
    wanted = targets != IGNORED
    logits = F.linear(final_states(weights, token_ids)[wanted], weights["transformer.output_layer.weight"])
    return F.cross_entropy(logits, targets[wanted], label_smoothing=0.02)
