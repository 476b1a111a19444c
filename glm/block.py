"""One small block class per kind of family: a layer from hidden states to hidden states."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from glm.attention import Geometry, attend
from glm.config import ModelConfig
from glm.kernels.layer import LayerShape, NativeLayer, NativeStack, NormWeights
from glm.kernels.native import NativeKernels, NativeWeight
from glm.linear import NativeLinear
from glm.norm import LayerNorm, RMSNorm
from glm.quantization import StoredPart
from glm.rotary import RotaryTable, inverse_frequencies, rotate_halves, rotate_neighbours
from glm.weights import Placement, build_linear, build_vector

# ChatGLM-6B's blocks always believe to be 28: the original never tells them its number of layers.
_PREFIX_ALPHA = math.sqrt(2 * 28)


class Opened(NamedTuple):
    """A layer as far as its attention: what is added later, and what attention takes, rotated."""

    residual: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class Block(Protocol):
    """What a range of layers is made of: a call opens the layer, attends and closes it."""

    num_bytes: int
    kernel_path: str
    native: NativeStack | None

    def __call__(self, hidden: torch.Tensor, geometry: Geometry, layer: int) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same; `layer` counts from the start of the range."""

    def open(self, hidden: torch.Tensor, rotary: RotaryTable) -> Opened:
        """[num_tokens, hidden_size] -> what attention needs."""

    def close(self, residual: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What attention gave, [num_tokens, num_heads * head_dim] -> [num_tokens, hidden_size]."""


class _Linears:
    """The four linear layers that every family has."""

    def __init__(self, parts: Mapping[str, StoredPart], placement: Placement) -> None:
        self.query_key_value = build_linear(parts, "query_key_value", placement)
        self.dense = build_linear(parts, "dense", placement)
        self.up = build_linear(parts, "dense_h_to_4h", placement)
        self.down = build_linear(parts, "dense_4h_to_h", placement)
        linears = (self.query_key_value, self.dense, self.up, self.down)
        self.num_bytes = sum(x.num_bytes for x in linears)
        self.kernel_path = " and ".join(sorted({x.path for x in linears}))

    def native(self, kernels: NativeKernels) -> tuple[NativeWeight, NativeWeight, NativeWeight, NativeWeight] | None:
        """The weights as the native kernels see them; None if those do not know the kind of each."""
        found = [
            linear.native
            for linear in (self.query_key_value, self.dense, self.up, self.down)
            if isinstance(linear, NativeLinear) and linear.kernels is kernels
        ]
        return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None


class _Layer(ABC):
    """What both kinds of block share: the call, in one go where the native kernels can."""

    linears: _Linears
    native: NativeStack | None

    @abstractmethod
    def open(self, hidden: torch.Tensor, rotary: RotaryTable) -> Opened:
        """See `Block`."""

    @abstractmethod
    def close(self, residual: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """See `Block`."""

    def __call__(self, hidden: torch.Tensor, geometry: Geometry, layer: int) -> torch.Tensor:
        if self.native is not None:
            return self.native(hidden, geometry.rotary.cos, geometry.rotary.sin, geometry.sequences(layer))
        residual, *attended = self.open(hidden, geometry.rotary)
        return self.close(residual, attend(geometry, layer, *attended))

    def _make_native(
        self, config: ModelConfig, placement: Placement, alpha: float, *norms: LayerNorm | RMSNorm | None
    ) -> NativeStack | None:
        kernels = placement.attention_kernels
        linears = None if kernels is None else self.linears.native(kernels)
        if kernels is None or linears is None or linears[0].dtype != placement.dtype:
            return None
        weights = [None if n is None else NormWeights(n.weight, getattr(n, "bias", None)) for n in norms]
        assert weights[0] is not None and weights[1] is not None
        shape = LayerShape(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            2 if config.position_encoding_2d else 1,
            len(inverse_frequencies(config)),
            config.norm_eps,
            alpha,
            config.is_prefix_lm,
        )
        return NativeStack([NativeLayer(kernels, linears, (weights[0], weights[1], weights[2], weights[3]), shape)])


class PrefixBlock(_Layer):
    """ChatGLM-6B: layer norms whose normalised input is the residual branch, scaled by alpha; GELU."""

    def __init__(self, parts: Mapping[str, StoredPart], config: ModelConfig, placement: Placement) -> None:
        self.config = config
        self.linears = _Linears(parts, placement)
        self.input_norm, self.post_norm = (
            LayerNorm(
                build_vector(parts, f"{name}.weight", placement),
                build_vector(parts, f"{name}.bias", placement),
                config.norm_eps,
            )
            for name in ("input_layernorm", "post_attention_layernorm")
        )
        self.num_bytes = self.linears.num_bytes
        self.kernel_path = self.linears.kernel_path
        self.native = self._make_native(config, placement, _PREFIX_ALPHA, self.input_norm, self.post_norm, None, None)

    def open(self, hidden: torch.Tensor, rotary: RotaryTable) -> Opened:
        normed = self.input_norm(hidden)
        fused = self.linears.query_key_value(normed)
        query, key, value = fused.view(fused.shape[0], self.config.num_heads, 3, -1).unbind(2)
        return Opened(normed, rotate_halves(query, rotary), rotate_halves(key, rotary), value)

    def close(self, residual: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        hidden = _PREFIX_ALPHA * residual + self.linears.dense(context)
        normed = self.post_norm(hidden)
        activated = functional.gelu(self.linears.up(normed), approximate="tanh")
        return _PREFIX_ALPHA * normed + self.linears.down(activated)


class CausalBlock(_Layer):
    """ChatGLM2-6B and all later: pre-norm, grouped queries, gated SiLU.

    GLM-4-0414 (`glm4`) also normalises what attention and MLP give before it is added; the other families have no
    such norms and use what they are given.
    """

    def __init__(self, parts: Mapping[str, StoredPart], config: ModelConfig, placement: Placement) -> None:
        self.config = config
        self.linears = _Linears(parts, placement)

        self._kernels = placement.step_kernels

        def norm(name: str) -> RMSNorm:
            weight = build_vector(parts, f"{name}.weight", placement)
            return RMSNorm(weight, config.norm_eps, self._kernels)

        def optional_norm(name: str) -> RMSNorm | None:
            return norm(name) if f"{name}.weight" in parts else None

        self.input_norm, self.post_norm = norm("input_layernorm"), norm("post_attention_layernorm")
        self.attention_out_norm = optional_norm("post_self_attn_layernorm")
        self.mlp_out_norm = optional_norm("post_mlp_layernorm")
        self.num_bytes = self.linears.num_bytes
        self.kernel_path = self.linears.kernel_path
        norms = (self.input_norm, self.post_norm, self.attention_out_norm, self.mlp_out_norm)
        self.native = self._make_native(config, placement, 1, *norms)

    def open(self, hidden: torch.Tensor, rotary: RotaryTable) -> Opened:
        config = self.config
        sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        fused = self.linears.query_key_value(self.input_norm(hidden)).view(hidden.shape[0], -1, config.head_dim)
        if self._kernels is not None:
            self._kernels.rotate(fused, config.num_heads + config.num_kv_heads, rotary.cos, rotary.sin)
            return Opened(hidden, *fused.split(sizes, dim=1))
        query, key, value = fused.split(sizes, dim=1)
        return Opened(hidden, rotate_neighbours(query, rotary), rotate_neighbours(key, rotary), value)

    def close(self, residual: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        attended = self.linears.dense(context)
        hidden = residual + (self.attention_out_norm(attended) if self.attention_out_norm else attended)
        expanded = self.linears.down(self._gate(self.linears.up(self.post_norm(hidden))))
        return hidden + (self.mlp_out_norm(expanded) if self.mlp_out_norm else expanded)

    def _gate(self, x: torch.Tensor) -> torch.Tensor:
        if self._kernels is not None:
            return self._kernels.gate(x)
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


def make_block(parts: Mapping[str, StoredPart], config: ModelConfig, placement: Placement) -> Block:
    """The block of the config's family."""
    return (PrefixBlock if config.is_prefix_lm else CausalBlock)(parts, config, placement)
