"""All dialects of config.json become one dataclass; impossible values are refused by key, value and wish."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm.config import load_config, parse_config
from glm.errors import ConfigError
from tests.tiny_checkpoints import CAUSAL, FAMILIES, NATIVE, NATIVE4, PREFIX, stored_shapes

PUBLISHED = {
    "chatglm-6b": ("chatglm", 28, 32, 32, 16384, 130528, 2048, (130005,)),
    "chatglm2-6b": ("chatglm2", 28, 32, 2, 13696, 65024, 32768, (2,)),
    "chatglm2-6b-int4": ("chatglm2", 28, 32, 2, 13696, 65024, 32768, (2,)),
    "chatglm3-6b": ("chatglm2", 28, 32, 2, 13696, 65024, 8192, (2,)),
    "glm-4-9b-chat": ("chatglm2", 40, 32, 2, 13696, 151552, 131072, (151329, 151336, 151338)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, shared_dir: Path) -> None:
    """The publisher's own files give the dimensions the models are known by."""
    config = load_config(shared_dir / "golden" / "published" / name)
    dims = (config.family, config.num_layers, config.num_heads, config.num_kv_heads, config.ffn_size)
    assert (*dims, config.vocab_size, config.max_context, config.eos_ids) == PUBLISHED[name]
    assert (config.hidden_size, config.head_dim, config.is_prefix_lm) == (4096, 128, name == "chatglm-6b")
    assert config.quantization_bits == (4 if "int4" in name else None)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
def test_layouts_name_the_tensors_of_the_published_indexes(name: str, shared_dir: Path) -> None:
    """Every tensor the network wants is in the published index, and it wants all but the unused rotary tables."""
    directory = shared_dir / "golden" / "published" / name
    published = set(json.loads((directory / "pytorch_model.bin.index.json").read_text())["weight_map"])
    wanted = set(stored_shapes(load_config(directory)))
    assert wanted <= published
    assert all("inv_freq" in name for name in published - wanted)


def test_rotary_bases() -> None:
    """GLM-4's rope_ratio multiplies the base; half of a head is rotated, all of ChatGLM-6B's."""
    assert parse_config(CAUSAL).rotary_base == 10000
    assert parse_config({**CAUSAL, "rope_ratio": 500}).rotary_base == 5_000_000
    assert parse_config(CAUSAL).rotary_dim == 4
    assert parse_config(PREFIX).rotary_dim == 8
    assert parse_config({**NATIVE, "partial_rotary_factor": 0.25}).rotary_dim == 4


def test_rope_ratio_divides_positions_in_chatglm2_and_multiplies_the_base_later() -> None:
    """The name decides where no file does; what was understood is said, and whether that was a guess."""
    second = parse_config({**CAUSAL, "rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"})
    assert (second.rotary_base, second.rotary_scaling) == (10000, 16)
    assert second.rotary_note == (
        "positions are divided by 16, as in ChatGLM2: config.json calls it 'THUDM/chatglm2-6b-32k'"
    )
    third = parse_config({**CAUSAL, "rope_ratio": 16, "_name_or_path": "THUDM/chatglm3-6b-32k"})
    assert (third.rotary_base, third.rotary_scaling) == (160_000, 1)
    assert third.rotary_note.startswith("the rotary base is multiplied by 16, as in ChatGLM3 and GLM-4")
    guessed = parse_config({**CAUSAL, "rope_ratio": 50}).rotary_note
    assert 'for the other way put "rope_scaling": {"type": "linear", "factor": 50} into config.json' in guessed
    assert parse_config({**CAUSAL, "rope_ratio": 1}).rotary_note == parse_config(CAUSAL).rotary_note == ""


def test_rope_scaling_overrides_what_is_found_of_rope_ratio() -> None:
    """Written by whoever knows better than the names: linear divides, default multiplies."""
    keys = {**CAUSAL, "rope_ratio": 16}
    linear = parse_config({**keys, "rope_scaling": {"type": "linear", "factor": 16}, "_name_or_path": "chatglm3-6b"})
    assert (linear.rotary_base, linear.rotary_scaling) == (10000, 16)
    default = parse_config({**keys, "rope_scaling": {"rope_type": "default"}, "_name_or_path": "chatglm2-6b"})
    assert (default.rotary_base, default.rotary_scaling) == (160_000, 1)
    assert parse_config({**NATIVE, "rope_scaling": {"type": "linear", "factor": 4}}).rotary_scaling == 4


def test_mask_ids_of_early_revisions() -> None:
    """ChatGLM-6B's first revisions name neither mask id: both are counted back from bos."""
    keys = {key: value for key, value in PREFIX.items() if "mask" not in key}
    config = parse_config(keys)
    assert (config.mask_id, config.gmask_id) == (90, 91)


def test_null_is_absent() -> None:
    """transformers writes null for what it leaves to a default."""
    nulls = {"rope_scaling": None, "rope_parameters": None, "hidden_act": None, "quantization_config": None}
    assert parse_config({**NATIVE, **nulls, "attention_bias": None, "bos_token_id": None}) == parse_config(NATIVE)


def test_defaults_of_the_transformers_classes() -> None:
    """A key that transformers' own class defaults may be absent."""
    optional = {"num_key_value_heads", "head_dim", "max_position_embeddings", "partial_rotary_factor", "rope_theta"}
    optional |= {"attention_bias", "tie_word_embeddings", "torch_dtype", "eos_token_id", "pad_token_id"}
    config = parse_config({key: value for key, value in NATIVE4.items() if key not in optional})
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim, config.rotary_base) == (2, 128, 64, 10000)
    assert (config.max_context, config.norm_eps, config.qkv_bias) == (131072, 1.5625e-07, True)
    assert (config.tied_ends, config.eos_ids, config.pad_id, config.stored_dtype) == (False, (), None, "float32")


@pytest.mark.parametrize("model_type", ["llama", "", None, 3, "chatglm2", ["glm"]])
def test_unsupported_model_types_list_the_supported(model_type: object) -> None:
    """The type that is there, and all that would do."""
    with pytest.raises(ConfigError) as caught:
        parse_config({**CAUSAL, "model_type": model_type}, source="here")
    message = str(caught.value)
    assert f"model_type {model_type!r} is not supported" in message
    for supported in ("'chatglm'", "'glm'", "'glm4'", "ChatGLM-6B", "GLM-4-9B-chat", "glm-edge", "GLM-Z1"):
        assert supported in message


COUNTS = {
    "chatglm": ("num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size"),
    "chatglm2": (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "kv_channels",
        "multi_query_group_num",
        "ffn_hidden_size",
        "padded_vocab_size",
        "seq_length",
    ),
    "glm": (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ),
}
NOT_COUNTS = (-1, 0, 1.5, 4.0, True, "8", [8], {}, 2**31, 10**30)


@pytest.mark.parametrize(("family", "key"), [(family, key) for family, keys in COUNTS.items() for key in keys])
def test_impossible_counts_are_refused(family: str, key: str) -> None:
    """Negative, zero, fractional, boolean, text, a list, absurdly large; and, where there is no default, absent."""
    for value in NOT_COUNTS:
        with pytest.raises(ConfigError) as caught:
            parse_config({**FAMILIES[family], key: value}, source="here/config.json")
        assert str(caught.value) == f"here/config.json: {key} is {value!r}, it must be a positive whole number"


@pytest.mark.parametrize(
    ("family", "key"),
    [
        (family, key)
        for family, keys in COUNTS.items()
        for key in keys
        if key not in ("num_key_value_heads", "head_dim", "max_position_embeddings", "inner_hidden_size")
    ],
)
def test_absent_counts_are_refused(family: str, key: str) -> None:
    """No dimension of a model is guessed, but those that the publisher's classes default."""
    keys = {name: value for name, value in FAMILIES[family].items() if name != key}
    with pytest.raises(ConfigError, match=f"{key} is None, it must be a positive whole number"):
        parse_config(keys)


IMPOSSIBLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (PREFIX, {"layernorm_epsilon": 0}, "layernorm_epsilon is 0, it must be a positive number"),
    (PREFIX, {"layernorm_epsilon": "1e-5"}, "layernorm_epsilon is '1e-5', it must be a positive number"),
    (CAUSAL, {"layernorm_epsilon": float("nan")}, "layernorm_epsilon is nan, it must be a positive number"),
    (CAUSAL, {"layernorm_epsilon": float("inf")}, "layernorm_epsilon is inf, it must be a positive number"),
    (CAUSAL, {"rope_ratio": -1}, "rope_ratio is -1, it must be a positive number"),
    (CAUSAL, {"rope_ratio": True}, "rope_ratio is True, it must be a positive number"),
    (NATIVE, {"rope_theta": 0}, "rope_theta is 0, it must be a positive number"),
    (NATIVE, {"rope_parameters": {"rope_theta": "far"}}, "rope_theta is 'far', it must be a positive number"),
    (NATIVE, {"rope_parameters": "default"}, "rope_parameters is 'default', it must be an object"),
    (NATIVE, {"rope_scaling": [4]}, r"rope_scaling is \[4\], it must be an object"),
    (NATIVE, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rotary scaling 'yarn' is not supported; remove"),
    (CAUSAL, {"rope_scaling": {"type": "dynamic"}}, "rotary scaling 'dynamic' is not supported; remove"),
    (NATIVE, {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is None, it must be a positive number"),
    (NATIVE, {"partial_rotary_factor": 2.0}, "a rotary width of 32 does not fit heads of 16"),
    (NATIVE, {"partial_rotary_factor": 0.01}, "a rotary width of 0 does not fit heads of 16"),
    (NATIVE, {"head_dim": 15}, "a rotary width of 7 does not fit heads of 15"),
    (CAUSAL, {"kv_channels": 6}, "a rotary width of 3 does not fit heads of 6"),
    (NATIVE, {"hidden_act": "gelu"}, "hidden_act is 'gelu', it must be 'silu'"),
    (
        NATIVE4,
        {"quantization_config": {"bits": 4}},
        "quantised by 'quantization_config', which is not supported: use the model",
    ),
    (NATIVE, {"attention_bias": "yes"}, "attention_bias is 'yes', it must be true or false"),
    (NATIVE, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, it must be true or false"),
    (NATIVE, {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key/value groups"),
    (CAUSAL, {"multi_query_group_num": 8}, "4 attention heads cannot share 8 key/value groups"),
    (CAUSAL, {"multi_query_attention": None, "multi_query_group_num": 0, "add_qkv_bias": 1}, "add_qkv_bias is 1"),
    (CAUSAL, {"rmsnorm": False}, "rmsnorm is False, it must be true: no published GLM model has the other value"),
    (CAUSAL, {"add_bias_linear": True}, "add_bias_linear is True, it must be false"),
    (CAUSAL, {"post_layer_norm": False}, "post_layer_norm is False, it must be true"),
    (CAUSAL, {"original_rope": False}, "original_rope is False, it must be true"),
    (CAUSAL, {"interleaved_qkv": True}, "interleaved_qkv is True, it must be false"),
    (PREFIX, {"pre_seq_len": 128}, "pre_seq_len is 128, it must be absent or null: a P-Tuning prefix is not"),
    (PREFIX, {"num_attention_heads": 5}, "num_attention_heads is 5, it must be a divisor of hidden_size 32"),
    (PREFIX, {"num_attention_heads": 16}, "leaving heads of 4, 8, 12"),
    (PREFIX, {"position_encoding_2d": 2}, "position_encoding_2d is 2, it must be true or false"),
    (PREFIX, {"bos_token_id": None}, "bos_token_id is None, it must be a token id: prompt positions depend on it"),
    (PREFIX, {"bos_token_id": 96}, "bos_token_id is 96, it must be below the vocabulary size 96"),
    (PREFIX, {"gmask_token_id": 400}, "gmask_token_id is 400, it must be below the vocabulary size 96"),
    (PREFIX, {"mask_token_id": -4}, "mask_token_id is -4, it must be a token id"),
    (PREFIX, {"eos_token_id": 1000}, "eos_token_id is 1000, it must be below the vocabulary size 96"),
    (CAUSAL, {"eos_token_id": [2, 96]}, r"eos_token_id is \[2, 96\], it must be below the vocabulary size 96"),
    (CAUSAL, {"eos_token_id": [2, "3"]}, r"eos_token_id is \[2, '3'\], it must be a token id or a list of them"),
    (CAUSAL, {"eos_token_id": -1}, "eos_token_id is -1, it must be a token id or a list of them"),
    (CAUSAL, {"eos_token_id": True}, "eos_token_id is True, it must be a token id or a list of them"),
    (CAUSAL, {"pad_token_id": 1.0}, "pad_token_id is 1.0, it must be a token id"),
    (CAUSAL, {"torch_dtype": "float64"}, "torch_dtype is 'float64', it must be float16, bfloat16 or float32"),
    (NATIVE, {"torch_dtype": None, "dtype": 16}, "dtype is 16, it must be float16, bfloat16 or float32"),
    (CAUSAL, {"quantization_bit": 3}, "quantization_bit is 3, it must be 4, 8 or 0"),
    (CAUSAL, {"quantization_bit": "4"}, "quantization_bit is '4', it must be 4, 8 or 0"),
    (PREFIX, {"quantization_bit": 8.0}, "quantization_bit is 8.0, it must be 4, 8 or 0"),
    (PREFIX, {"quantization_bit": True}, "quantization_bit is True, it must be 4, 8 or 0"),
    (PREFIX, {"quantization_bit": []}, r"quantization_bit is \[\], it must be 4, 8 or 0"),
    (PREFIX, {"quantization_embeddings": "no"}, "quantization_embeddings is 'no', it must be true or false"),
]


@pytest.mark.parametrize(("keys", "change", "complaint"), IMPOSSIBLE, ids=[str(change) for _, change, _ in IMPOSSIBLE])
def test_impossible_values_are_refused(keys: dict[str, Any], change: dict[str, Any], complaint: str) -> None:
    """The key, what it is, what it must be."""
    with pytest.raises(ConfigError, match=complaint):
        parse_config({**keys, **change})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "has no config.json: is this a model directory"),
        (b"", "config.json is not readable JSON"),
        (b"{", "config.json is not readable JSON"),
        (b"\xff\xfe", "config.json is not readable JSON"),
        (b"[1]", "config.json holds a list, not a JSON object"),
        (b"null", "config.json holds a NoneType, not a JSON object"),
    ],
)
def test_unreadable_configs_are_refused(content: bytes | None, complaint: str, tmp_path: Path) -> None:
    """No file, no JSON, no object."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        load_config(tmp_path)


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    """A hostile file is refused like any other damaged one."""
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"config.json is not readable JSON"):
        load_config(tmp_path)
