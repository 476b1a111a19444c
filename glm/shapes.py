"""Shapes of published models, to run with random weights: `random:chatglm2-6b` in place of a model directory.

The keys are those of the models' own config.json, as far as they matter for what a model computes and weighs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm.errors import ModelNotFoundError

PREFIX = "random:"

_CHATGLM2: Mapping[str, Any] = {
    "model_type": "chatglm",
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
    "add_qkv_bias": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float16",
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "chatglm-6b": {
        "model_type": "chatglm",
        "num_layers": 28,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "inner_hidden_size": 16384,
        "vocab_size": 130528,
        "max_sequence_length": 2048,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "pad_token_id": 3,
        "torch_dtype": "float16",
    },
    "chatglm2-6b": _CHATGLM2,
    "glm-4-9b": {
        **_CHATGLM2,
        "num_layers": 40,
        "padded_vocab_size": 151552,
        "seq_length": 131072,
        "layernorm_epsilon": 1.5625e-07,
        "rope_ratio": 500,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
        "torch_dtype": "bfloat16",
    },
    "tiny": {
        **_CHATGLM2,
        "num_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "ffn_hidden_size": 256,
        "padded_vocab_size": 1024,
        "seq_length": 2048,
    },
}
"""ChatGLM3-6B has the shape of chatglm2-6b; `tiny` is of the same layout, for trying things out."""


def random_shape(model: str | Path) -> str | None:
    """The shape that `random:SHAPE` names, None for any other model.

    Raises:
        ModelNotFoundError: no such shape.
    """
    name = str(model)
    if not name.startswith(PREFIX):
        return None
    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise ModelNotFoundError(f"no model {name!r}: there is no shape {shape!r}; choose one of {', '.join(SHAPES)}")
    return shape
