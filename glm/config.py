"""One frozen dataclass for all dialects of config.json that GLM models were published with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glm.errors import ConfigError
from glm.foreign_model import foreign_folder, scheme_complaint
from glm.json_file import read_json_object
from glm.lineage import Lineage, directory_name, find_lineage
from glm.shapes import SHAPES, random_shape
from glm.small_file import is_file

Family = Literal["chatglm", "chatglm2", "glm", "glm4"]

_TRANSFORMERS_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "multi_query_group_num",
    "head_dim": "kv_channels",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "seq_length",
    "rms_norm_eps": "layernorm_epsilon",
}
"""What the publisher's own layout calls the same."""

MOST_LAYERS = 10_000
"""Many times what any model has: lists of layers are made from this number before a weight is read."""

SUPPORTED = (
    "model_type 'chatglm' (ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2-6B, GLM-4-9B-chat), "
    "'glm' (glm-4-9b-chat-hf, glm-edge) and 'glm4' (GLM-4-0414, GLM-Z1)"
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The facts about a model that the network, the tokenizer and the planner need.

    `family` names the on-disk layout and block: "chatglm" is ChatGLM-6B, "chatglm2" everything published since in
    the publisher's own layout (ChatGLM2/3-6B, CodeGeeX2, GLM-4-9B-chat), "glm" and "glm4" are transformers' layouts.
    Sizes are counts of elements. `rotary_dim` is the width of a head that is rotated, and positions count as divided
    by `rotary_scaling`. `published_name`, `saved_by` (a version of transformers) and `rope_ratio` are what config.json
    itself says, of use for telling models of one layout apart.
    """

    family: Family
    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rotary_dim: int
    rotary_base: float
    stored_dtype: str
    eos_ids: tuple[int, ...]
    pad_id: int | None
    bos_id: int | None = None
    mask_id: int | None = None
    gmask_id: int | None = None
    qkv_bias: bool = True
    tied_ends: bool = False
    position_encoding_2d: bool = False
    quantization_bits: int | None = None
    quantized_ends: bool = False
    rotary_scaling: float = 1.0
    rotary_note: str = ""
    """How rope_ratio was understood and why, for people; empty where there is nothing to understand."""
    rope_ratio: float | None = None
    published_name: str = ""
    saved_by: str = ""

    @property
    def is_prefix_lm(self) -> bool:
        """Whether prompt tokens attend to each other both ways (ChatGLM-6B)."""
        return self.family == "chatglm"

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query/key/value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def load_config(model_dir: Path) -> ModelConfig:
    """Read `config.json` of a model directory; `random:SHAPE` gives the config of that shape.

    Raises:
        ConfigError: no such file, not JSON, an unsupported model_type, or a key with an impossible value.
        ModelNotFoundError: no such shape.
    """
    shape = random_shape(model_dir)
    if shape is not None:
        return parse_config(SHAPES[shape], source=str(model_dir), name=str(model_dir))
    path = model_dir / "config.json"
    if not is_file(path, ConfigError):
        raise ConfigError(foreign_folder(model_dir) or f"{model_dir} has no config.json: is this a model directory?")
    raw = read_json_object(path, ConfigError)
    return parse_config(raw, source=str(path), name=directory_name(model_dir), model_dir=model_dir)


def parse_config(
    raw: Mapping[str, Any], *, source: str = "config.json", name: str = "", model_dir: Path | None = None
) -> ModelConfig:
    """Turn the keys of a config.json into a `ModelConfig`; `source` is how error messages call it.

    The other files of `model_dir` tell how rope_ratio is meant, where the keys do not.
    """
    keys = _Keys(raw, source)
    model_type = raw.get("model_type")
    if "pre_seq_len" in keys.raw:
        raise keys.fail(
            "pre_seq_len",
            "absent or null: a P-Tuning prefix is not supported, and cannot be merged into the weights; use the model "
            "it was trained on, or fine-tune with LoRA and merge that",
        )
    keys.check_published_weights()
    if model_type == "chatglm":
        config = _parse_chatglm(keys) if "inner_hidden_size" in raw else _parse_chatglm2(keys)
    elif model_type in ("glm", "glm4"):
        config = _parse_transformers(keys, model_type)
    else:
        raise ConfigError(f"{source}: model_type {model_type!r:.200} is not supported; supported are {SUPPORTED}")
    keys.check(config)
    published = str(raw.get("_name_or_path") or "")
    config = replace(
        config, name=published or name, published_name=published, saved_by=str(raw.get("transformers_version") or "")
    )
    return _with_rope_ratio(config, keys, model_dir) if config.family == "chatglm2" else config


def _with_rope_ratio(config: ModelConfig, keys: "_Keys", model_dir: Path | None) -> ModelConfig:
    """ChatGLM2-6B-32k divides positions by rope_ratio; ChatGLM3 and GLM-4 multiply the rotary base by it.

    `rope_scaling` says which, where somebody has written it: of type `linear` with a `factor`, or `default`.
    """
    ratio = config.rope_ratio
    if "rope_scaling" in keys.raw:
        factor = keys.linear_factor(keys.mapping("rope_scaling"))
        if factor is not None:
            return replace(config, rotary_scaling=factor, rotary_note=_rotary_note(factor, "rope_scaling says so"))
        lineage = Lineage("chatglm3", "rope_scaling says so")
    elif ratio in (None, 1.0):
        return config
    else:
        lineage = find_lineage(config, model_dir)
    ratio = 1.0 if ratio is None else ratio
    is_divided = lineage.ancestor in ("chatglm2", "codegeex2")
    reason = lineage.reason
    if not lineage.is_certain:
        other = '{"type": "default"}' if is_divided else f'{{"type": "linear", "factor": {ratio:g}}}'
        reason += f'. That is a guess; for the other way put "rope_scaling": {other} into config.json'
    if is_divided:
        return replace(config, rotary_scaling=ratio, rotary_note=_rotary_note(ratio, f"as in ChatGLM2: {reason}"))
    note = f"the rotary base is multiplied by {ratio:g}, as in ChatGLM3 and GLM-4: {reason}"
    return replace(config, rotary_base=config.rotary_base * ratio, rotary_note=note)


def _rotary_note(divisor: float, reason: str) -> str:
    return f"positions are divided by {divisor:g}, {reason}"


class _Keys:
    """Typed access to the keys of one config.json; every complaint names the key, its value and what it must be.

    A key whose value is null counts as absent.
    """

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = {key: value for key, value in raw.items() if value is not None}
        self.source = source

    def fail(self, key: str, must: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key} is {self.raw.get(key)!r:.200}, it must be {must}")

    def layers(self, key: str) -> int:
        count = self.count(key)
        if count > MOST_LAYERS:
            raise self.fail(key, f"at most {MOST_LAYERS}")
        return count

    def count(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.fail(key, "a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
            raise self.fail(key, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def require(self, key: str, wanted: bool) -> None:
        if self.flag(key, wanted) is not wanted:
            raise self.fail(key, f"{str(wanted).lower()}: no published GLM model has the other value")

    def token_id(self, key: str, default: int | None = None) -> int | None:
        value = self.raw.get(key, default)
        if value is not None and not _is_token_id(value):
            raise self.fail(key, "a token id (a whole number from 0)")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(map(_is_token_id, values)):
            raise self.fail(key, "a token id or a list of them")
        return tuple(values)

    def stored_dtype(self) -> str:
        key = "torch_dtype" if "torch_dtype" in self.raw else "dtype"
        value = self.raw.get(key, "float32")
        if value not in ("float16", "bfloat16", "float32"):
            raise self.fail(key, "float16, bfloat16 or float32")
        return str(value)

    def quantization_bits(self) -> int | None:
        value = self.raw.get("quantization_bit", 0)
        if type(value) is not int or value not in (0, 4, 8):
            raise self.fail("quantization_bit", "4, 8 or 0")
        return value or None

    def check_published_weights(self) -> None:
        """Of whatever layout: another quantisation than the publisher's is named."""
        if "quantization_config" in self.raw:
            found = self.raw["quantization_config"]
            scheme = found.get("quant_method") if isinstance(found, dict) else None
            raise ConfigError(f"{self.source}: {scheme_complaint(scheme or 'quantization_config')}")

    def check_layout(self) -> None:
        """Of the publisher's layout: keys as transformers' layout has them are named, and what they are called here."""
        found = [
            f"{key} for {own}" for key, own in _TRANSFORMERS_KEYS.items() if key in self.raw and own not in self.raw
        ]
        if found:
            raise ConfigError(
                f"{self.source}: model_type 'chatglm' is the publisher's layout, but keys are called as in "
                f"transformers' ({', '.join(found)}): use the config.json published with the weights; transformers' "
                "own layout is model_type 'glm' or 'glm4', with weights called model.layers..."
            )

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.raw.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value

    def linear_factor(self, rope: Mapping[str, Any]) -> float | None:
        """What positions are divided by; None where rotary scaling is of the default type."""
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type == "default":
            return None
        if rope_type != "linear":
            raise ConfigError(
                f"{self.source}: rotary scaling {rope_type!r:.200} is not supported; remove rope_scaling, or make it "
                "'linear' or 'default'"
            )
        return _Keys(rope, f"{self.source}, rope_scaling").number("factor", 0.0)

    def check(self, config: ModelConfig) -> None:
        """What must hold between keys, in every family."""
        if config.num_heads % config.num_kv_heads:
            raise ConfigError(
                f"{self.source}: {config.num_heads} attention heads cannot share {config.num_kv_heads} key/value "
                "groups; the first must be a multiple of the second"
            )
        if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
            raise ConfigError(
                f"{self.source}: a rotary width of {config.rotary_dim} does not fit heads of {config.head_dim}; "
                "it must be even and at most the head's width"
            )
        ids = {"eos": config.eos_ids, "bos": (config.bos_id,), "pad": (config.pad_id,)}
        ids |= {"mask": (config.mask_id,), "gmask": (config.gmask_id,)}
        for kind, values in ids.items():
            if any(i is not None and i >= config.vocab_size for i in values):
                raise self.fail(f"{kind}_token_id", f"below the vocabulary size {config.vocab_size}")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_chatglm(keys: _Keys) -> ModelConfig:
    hidden_size, num_heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    if hidden_size % num_heads or (hidden_size // num_heads) % 4:
        raise keys.fail("num_attention_heads", f"a divisor of hidden_size {hidden_size} leaving heads of 4, 8, 12, ...")
    bos_id = keys.token_id("bos_token_id")
    if bos_id is None:
        raise keys.fail("bos_token_id", "a token id: prompt positions depend on it")
    head_dim = hidden_size // num_heads
    return ModelConfig(
        family="chatglm",
        name="",
        num_layers=keys.layers("num_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        ffn_size=keys.count("inner_hidden_size"),
        vocab_size=keys.count("vocab_size"),
        max_context=keys.count("max_sequence_length", 2048),
        norm_eps=keys.number("layernorm_epsilon", 1e-5),
        rotary_dim=head_dim,
        rotary_base=10000.0,
        stored_dtype=keys.stored_dtype(),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
        bos_id=bos_id,
        # Revisions of spring 2023 leave these out; in every vocabulary [MASK] [gMASK] [sMASK] <unused_0> precede <sop>.
        mask_id=keys.token_id("mask_token_id", bos_id - 4),
        gmask_id=keys.token_id("gmask_token_id", bos_id - 3),
        tied_ends=True,
        position_encoding_2d=keys.flag("position_encoding_2d", True),
        quantization_bits=keys.quantization_bits(),
        quantized_ends=keys.flag("quantization_embeddings", False),
    )


def _parse_chatglm2(keys: _Keys) -> ModelConfig:
    keys.check_layout()
    for key, wanted in (
        ("add_bias_linear", False),
        ("rmsnorm", True),
        ("post_layer_norm", True),
        ("apply_residual_connection_post_layernorm", False),
        ("original_rope", True),
        ("interleaved_qkv", False),
    ):
        keys.require(key, wanted)
    num_heads, head_dim = keys.count("num_attention_heads"), keys.count("kv_channels")
    grouped = keys.flag("multi_query_attention", False)
    return ModelConfig(
        family="chatglm2",
        name="",
        num_layers=keys.layers("num_layers"),
        hidden_size=keys.count("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=keys.count("multi_query_group_num") if grouped else num_heads,
        head_dim=head_dim,
        ffn_size=keys.count("ffn_hidden_size"),
        vocab_size=keys.count("padded_vocab_size"),
        max_context=keys.count("seq_length"),
        norm_eps=keys.number("layernorm_epsilon", 1e-5),
        rotary_dim=head_dim // 2,
        rotary_base=10000.0,
        rope_ratio=keys.number("rope_ratio", 1.0) if "rope_ratio" in keys.raw else None,
        stored_dtype=keys.stored_dtype(),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
        qkv_bias=keys.flag("add_qkv_bias", False),
        tied_ends=keys.flag("tie_word_embeddings", False),
        quantization_bits=keys.quantization_bits(),
    )


def _parse_transformers(keys: _Keys, family: Literal["glm", "glm4"]) -> ModelConfig:
    """Keys and defaults of transformers' GlmConfig and Glm4Config (rope keys at the top before 5.0, nested since)."""
    rope = {**keys.mapping("rope_scaling"), **keys.mapping("rope_parameters")}
    factor = keys.linear_factor(rope)
    if keys.raw.get("hidden_act", "silu") != "silu":
        raise keys.fail("hidden_act", "'silu'")
    head_dim, rope_keys = keys.count("head_dim", 128), _Keys({**keys.raw, **rope}, keys.source)
    return ModelConfig(
        family=family,
        name="",
        num_layers=keys.layers("num_hidden_layers"),
        hidden_size=keys.count("hidden_size"),
        num_heads=keys.count("num_attention_heads"),
        num_kv_heads=keys.count("num_key_value_heads", 2),
        head_dim=head_dim,
        ffn_size=keys.count("intermediate_size"),
        vocab_size=keys.count("vocab_size"),
        max_context=keys.count("max_position_embeddings", 131072),
        norm_eps=keys.number("rms_norm_eps", 1.5625e-07),
        rotary_dim=int(head_dim * rope_keys.number("partial_rotary_factor", 0.5)),
        rotary_base=rope_keys.number("rope_theta", 10000.0),
        rotary_scaling=factor or 1.0,
        stored_dtype=keys.stored_dtype(),
        eos_ids=keys.token_ids("eos_token_id"),
        pad_id=keys.token_id("pad_token_id"),
        qkv_bias=keys.flag("attention_bias", True),
        tied_ends=keys.flag("tie_word_embeddings", False),
    )
