"""What the tensors of each family are called on disk, and which shapes config.json implies for them.

A `Source` is one matrix or vector of the network and the names it is stored under (several when the stored
projections are fused here). Quantised linears have `NAME_scale` beside a packed `NAME`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from glm.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Source:
    """Names on disk, with the rows of each, of one part of the network; `num_columns` None means a vector."""

    names: tuple[str, ...]
    num_rows: tuple[int, ...]
    num_columns: int | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name, as stored in a float checkpoint."""
        tail = () if self.num_columns is None else (self.num_columns,)
        return {name: (rows, *tail) for name, rows in zip(self.names, self.num_rows, strict=True)}


@dataclass(frozen=True, slots=True)
class Unit:
    """Parts of the network that are read, held and stored together, by the names that blocks and ends know them by."""

    name: str
    sources: Mapping[str, Source]


_LAYER_PREFIX = {
    "chatglm": "transformer.layers.{}.",
    "chatglm2": "transformer.encoder.layers.{}.",
    "glm": "model.layers.{}.",
    "glm4": "model.layers.{}.",
}
_END_NAMES = {
    "chatglm": ("transformer.word_embeddings.weight", "transformer.final_layernorm", "lm_head.weight"),
    "chatglm2": (
        "transformer.embedding.word_embeddings.weight",
        "transformer.encoder.final_layernorm",
        "transformer.output_layer.weight",
    ),
    "glm": ("model.embed_tokens.weight", "model.norm", "lm_head.weight"),
    "glm4": ("model.embed_tokens.weight", "model.norm", "lm_head.weight"),
}


def layer_sources(config: ModelConfig, layer: int) -> dict[str, Source]:
    """The parts of one layer (counted from 0) by the name blocks know them by."""
    prefix = _LAYER_PREFIX[config.family].format(layer)
    hidden, attended, ffn = config.hidden_size, config.num_heads * config.head_dim, config.ffn_size
    parts = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), hidden)
    sources = {f"{norm}.weight": Source((f"{prefix}{norm}.weight",), (size,)) for norm, size in parts.items()}
    if config.family in ("glm", "glm4"):
        return sources | _transformers_sources(config, prefix, attended)
    attention = "attention" if config.is_prefix_lm else "self_attention"
    gated = 1 if config.is_prefix_lm else 2

    def linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, Source]:
        weight = {f"{name.split('.')[-1]}.weight": Source((f"{prefix}{name}.weight",), (rows,), columns)}
        return weight | ({f"{name.split('.')[-1]}.bias": Source((f"{prefix}{name}.bias",), (rows,))} if bias else {})

    all_biases = config.is_prefix_lm
    sources |= linear(f"{attention}.query_key_value", config.qkv_size, hidden, all_biases or config.qkv_bias)
    sources |= linear(f"{attention}.dense", hidden, attended, all_biases)
    sources |= linear("mlp.dense_h_to_4h", gated * ffn, hidden, all_biases)
    sources |= linear("mlp.dense_4h_to_h", hidden, ffn, all_biases)
    if config.is_prefix_lm:
        sources |= {f"{n}.bias": Source((f"{prefix}{n}.bias",), (hidden,)) for n in parts}
    return sources


def _transformers_sources(config: ModelConfig, prefix: str, attended: int) -> dict[str, Source]:
    hidden, ffn, shared = config.hidden_size, config.ffn_size, config.num_kv_heads * config.head_dim
    rows = (attended, shared, shared)
    projections = tuple(f"{prefix}self_attn.{p}_proj" for p in "qkv")
    sources = {
        "query_key_value.weight": Source(tuple(f"{p}.weight" for p in projections), rows, hidden),
        "dense.weight": Source((f"{prefix}self_attn.o_proj.weight",), (hidden,), attended),
        "dense_h_to_4h.weight": Source((f"{prefix}mlp.gate_up_proj.weight",), (2 * ffn,), hidden),
        "dense_4h_to_h.weight": Source((f"{prefix}mlp.down_proj.weight",), (hidden,), ffn),
    }
    if config.qkv_bias:
        sources["query_key_value.bias"] = Source(tuple(f"{p}.bias" for p in projections), rows)
    if config.family == "glm4":
        for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            sources[f"{norm}.weight"] = Source((f"{prefix}{norm}.weight",), (hidden,))
    return sources


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name of all tensors of a float checkpoint, in the order of the network."""
    sources = [embedding_source(config)]
    for layer in range(config.num_layers):
        sources += layer_sources(config, layer).values()
    sources += final_norm_sources(config).values()
    if config.is_prefix_lm or not config.tied_ends:  # ChatGLM-6B's is tied and published all the same
        sources.append(lm_head_source(config))
    return {name: shape for source in sources for name, shape in source.shapes.items()}


def embedding_source(config: ModelConfig) -> Source:
    """The word embedding [vocab_size, hidden_size]."""
    return Source((_END_NAMES[config.family][0],), (config.vocab_size,), config.hidden_size)


def lm_head_source(config: ModelConfig) -> Source:
    """The output projection [vocab_size, hidden_size]; tied models may leave it out."""
    return Source((_END_NAMES[config.family][2],), (config.vocab_size,), config.hidden_size)


def final_norm_sources(config: ModelConfig) -> dict[str, Source]:
    """Weight, and in ChatGLM-6B bias, of the final norm."""
    base = _END_NAMES[config.family][1]
    kinds = ("weight", "bias") if config.is_prefix_lm else ("weight",)
    return {kind: Source((f"{base}.{kind}",), (config.hidden_size,)) for kind in kinds}


def layer_unit(config: ModelConfig, layer: int) -> Unit:
    """One layer, counted from 0; its name counts from 1."""
    return Unit(f"layer-{layer + 1:05}", layer_sources(config, layer))


def embedding_unit(config: ModelConfig) -> Unit:
    """The word embedding, its part `table`."""
    return Unit("embedding", {"table": embedding_source(config)})


def final_norm_unit(config: ModelConfig) -> Unit:
    """The final norm."""
    return Unit("final_layernorm", final_norm_sources(config))


def lm_head_unit(config: ModelConfig) -> Unit:
    """The output projection, its part `table`; tied models may leave it out."""
    return Unit("lm_head", {"table": lm_head_source(config)})


def all_units(config: ModelConfig) -> tuple[Unit, ...]:
    """Everything a model is made of, in the order of the network."""
    layers = (layer_unit(config, layer) for layer in range(config.num_layers))
    return (embedding_unit(config), *layers, final_norm_unit(config), lm_head_unit(config))
