"""Whole layers in one call of the native kernels: nothing is left for Python to do."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from glm.kernels.native import SCALAR_TYPES, CachedSequence, NativeKernels, NativeWeight, WeightPointers


class _Norm(ctypes.Structure):
    """Mirrors `Norm` in native/layer.cpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """Mirrors `Layer` in native/layer.cpp."""

    _fields_ = (
        *[(name, ctypes.POINTER(WeightPointers)) for name in ("query_key_value", "dense", "up", "down")],
        *[(name, _Norm) for name in ("input", "post", "attended", "expanded")],
        *[(n, ctypes.c_int64) for n in ("hidden_size", "heads", "kv_heads", "head_dim", "parts", "pairs")],
        *[(name, ctypes.c_float) for name in ("eps", "alpha")],
        *[(name, ctypes.c_int32) for name in ("is_prefix", "type")],
    )


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What the arithmetic of a layer depends on besides its weights.

    `rotary_parts` and `rotary_pairs`: the last two sizes of `rotary.RotaryTable`. `alpha` multiplies the residual.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_parts: int
    rotary_pairs: int
    eps: float
    alpha: float
    is_prefix: bool


@dataclass(frozen=True, slots=True)
class NormWeights:
    """Of a layer norm with bias, of an RMS norm without."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class NativeLayer:
    """Linear layers (fused query, key and value; dense; up; down) and norms (input, post-attention, and where a family
    has them those of what attention and of what the MLP gives), all in one dtype."""

    def __init__(
        self,
        kernels: NativeKernels,
        linears: tuple[NativeWeight, NativeWeight, NativeWeight, NativeWeight],
        norms: tuple[NormWeights, NormWeights, NormWeights | None, NormWeights | None],
        shape: LayerShape,
    ) -> None:
        self.kernels = kernels
        self._held = (linears, norms)  # the memory behind the pointers
        sizes = (shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        self._layer = _Layer(
            *[ctypes.pointer(linear.pointers) for linear in linears],
            *[_norm(norm) for norm in norms],
            *(*sizes, shape.rotary_parts, shape.rotary_pairs),
            *(shape.eps, shape.alpha, shape.is_prefix, SCALAR_TYPES[linears[0].dtype]),
        )

    @property
    def address(self) -> int:
        """Of the structure that says it all; good as long as this object lives."""
        return ctypes.addressof(self._layer)


class NativeStack:
    """Layers that follow one another, of one dtype and shape, in one call: behind each, Python's code and data are out
    of the processor's caches, and taking them up again costs more than all that it has to do there."""

    def __init__(self, layers: Sequence[NativeLayer]) -> None:
        self._kernels = layers[0].kernels
        self.layers = tuple(layers)
        self._addresses = (ctypes.c_void_p * len(layers))(*[layer.address for layer in layers])

    def __call__(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sequences: Sequence[CachedSequence]
    ) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same; each token's key and value go into its sequence's caches.

        `cos` and `sin` as in `rotary.RotaryTable`. The tokens of one sequence follow each other, see
        `NativeKernels.attend`. A token gets what it would get alone, bit for bit.
        """
        return self._kernels.layers(self._addresses, hidden, cos, sin, sequences)


def _norm(norm: NormWeights | None) -> _Norm:
    if norm is None:
        return _Norm(None, None)
    return _Norm(norm.weight.data_ptr(), None if norm.bias is None else norm.bias.data_ptr())
