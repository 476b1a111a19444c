"""The native CPU kernels: libraries built at install time (setup.py), one for each instruction set, called by ctypes.

They have one rule: what a token gets depends on that token and on what it sees, bit for bit, and neither on how many
others go with it nor on the number of threads. Each sum has an order of its own, which no tile and no tail changes.

A product with few rows of activations costs what reading the weights costs. Float weights are multiplied by
activations of their own dtype and summed in fp32. Integer weights enter exactly. AVX-512 rounds activations, relative
to the largest of each 32 columns, and multiplies byte by byte. Where the integers are the published model it rounds to
24 bits, which makes products as exact as torch's in fp32 (relative rms error 3e-7). Else int8 weights have 16 bits in
two thirds of the time (2e-5, a tenth of what fp16 activations would lose). int4 weights, which lose twenty times as
much themselves, have 8 bits (5e-3, as bf16 activations): a decode step is a sixth faster than with 16. The other
libraries are exact always.
"""

import ctypes
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glm.kernels.memory import empty_weight
from glm.kernels.packed import BLOCK_ROWS, GROUP_COLUMNS, PackedWeight, packed_shape
from glm.quantization import QuantizedWeight

# Raised, here and in native/kernels.cpp, with every change of a signature or a structure.
_INTERFACE = 5
# Best first.
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")
# `ScalarType` in native/product.h.
SCALAR_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class WeightPointers(ctypes.Structure):
    """Mirrors `Weight` in native/product.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("bits", "type", "is_exact")],
    )


class _Cache(ctypes.Structure):
    """Mirrors `Cache` in native/attention.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("keys", "values")],
        *[(name, ctypes.c_int64) for name in ("capacity", "length", "tokens", "visible")],
    )


class _Attention(ctypes.Structure):
    """Mirrors `Attention` in native/attention.h."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("query", "key", "value")],
        *[(f"{name}_token_stride", ctypes.c_int64) for name in ("query", "key", "value")],
        *[(f"{name}_stride", ctypes.c_int64) for name in ("query", "key", "value")],
        *[(name, ctypes.c_int64) for name in ("tokens", "heads", "kv_heads", "head_dim")],
        ("caches", ctypes.POINTER(_Cache)),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class CacheView:
    """Of one sequence in one layer: keys and values, both [num_kv_heads, capacity, head_dim] and contiguous, how many
    count, and for how many new tokens behind them there is room. Each of these sees the keys up to its own, and the
    first `num_visible` in any case."""

    keys: torch.Tensor
    values: torch.Tensor
    length: int
    num_new: int = 1
    num_visible: int = 0


class CachedSequence(NamedTuple):
    """One sequence in a range of layers: see `kv_cache.SequenceCache.places_from`, and `CacheView` for the rest.

    Mirrors `CachedSequence` in native/layer.cpp, each number in 64 bits.
    """

    places: int
    capacity: int
    length: int
    num_new: int
    num_visible: int


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """A weight as the kernels see it; `dtype` is that of activations, bias and result."""

    pointers: WeightPointers
    dtype: torch.dtype
    values: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None


class NativeKernels:
    """The kernels of one instruction set."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.name = name
        pointer, size, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._product = _function(library.glm_product, pointer, pointer, size, pointer, flag)
        self._pack = _function(library.glm_pack, pointer, pointer, pointer, pointer, flag)
        self._read = _function(library.glm_read, pointer, size, flag)
        self._rms_norm = _function(
            library.glm_rms_norm, pointer, pointer, ctypes.c_float, size, size, pointer, flag, flag
        )
        self._gate = _function(library.glm_gate, pointer, size, size, pointer, flag, flag)
        self._rotate = _function(
            library.glm_rotate, pointer, size, size, size, size, pointer, pointer, size, flag, flag
        )
        self._attend = _function(library.glm_attend, pointer, flag, flag)
        tables = (pointer, pointer)
        self._layers = _function(
            library.glm_layers, pointer, size, pointer, size, *tables, pointer, size, pointer, flag
        )

    def pack(self, weight: QuantizedWeight) -> PackedWeight | None:
        """The weight in the layout of the kernels, in memory of its own; None for a kind that they do not know."""
        scales, num_groups = weight.scales, weight.scales.shape[1]
        if num_groups > 1 and (weight.bits, num_groups * GROUP_COLUMNS) != (4, weight.num_columns):
            return None
        if weight.values.device.type != "cpu" or not weight.values.numel():
            return None
        source = weight.values.contiguous()
        values = empty_weight(packed_shape(weight), torch.uint8)
        group_scales = scales.to(torch.float16).contiguous() if num_groups > 1 else None
        row_scales = None
        if group_scales is None:
            row_scales = torch.zeros(values.shape[0] * BLOCK_ROWS)
            row_scales[: weight.num_rows] = scales.flatten()
        packed = PackedWeight(values, row_scales, weight.bits, weight.num_rows, weight.num_columns, weight.is_exact)
        pointers, threads = _pointers(packed, None), torch.get_num_threads()
        address = ctypes.addressof(pointers)
        self._pack(address, source.data_ptr(), _pointer(group_scales), values.data_ptr(), threads)
        return packed

    def prepare(self, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None) -> NativeWeight | None:
        """What `product` takes, pointing at the same memory; None for a kind of weight that it does not know."""
        if isinstance(weight, PackedWeight):
            values, scales, dtype = weight.values, weight.scales, torch.float32
        else:
            values, scales, dtype = weight, None, weight.dtype
            if not self.can_step(weight) or not weight.is_contiguous() or not weight.numel():
                return None
        if bias is not None and bias.dtype != dtype:
            return None
        return NativeWeight(_pointers(weight, bias), dtype, values, scales, bias)

    def product(self, x: torch.Tensor, weight: NativeWeight) -> torch.Tensor:
        """x [num_tokens, columns] times the weight [rows, columns], plus its bias -> [num_tokens, rows].

        Both in the dtype of a float weight, in fp32 for an integer one. A row of the result depends on its row of `x`
        alone, bit for bit, and on no number of threads.
        """
        assert x.dtype == weight.dtype and x.shape[1] == weight.pointers.columns
        x = x.contiguous()
        out = torch.empty(x.shape[0], weight.pointers.rows, dtype=x.dtype)
        threads = torch.get_num_threads()
        self._product(ctypes.addressof(weight.pointers), x.data_ptr(), x.shape[0], out.data_ptr(), threads)
        return out

    def can_step(self, example: torch.Tensor) -> bool:
        """Whether all functions here compute with tensors like this one."""
        return example.device.type == "cpu" and example.dtype in SCALAR_TYPES

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[num_tokens, size] -> the same: `norm.RMSNorm` in one pass."""
        x = x.contiguous()
        out = torch.empty_like(x)
        scalar, threads = SCALAR_TYPES[x.dtype], torch.get_num_threads()
        self._rms_norm(x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr(), scalar, threads)
        return out

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * size] -> [num_tokens, size]: SiLU of the first half times the second."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
        scalar, threads = SCALAR_TYPES[x.dtype], torch.get_num_threads()
        self._gate(x.data_ptr(), *out.shape, out.data_ptr(), scalar, threads)
        return out

    def rotate(self, x: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate neighbours in the first heads of x [num_tokens, more heads, head_dim], in place.

        `cos` and `sin`: fp32 [num_tokens, ..., pairs], as in `rotary.RotaryTable` for one-dimensional positions.
        """
        num_tokens, all_heads, head_dim = x.shape
        scalar, threads = SCALAR_TYPES[x.dtype], torch.get_num_threads()
        stride, tables = all_heads * head_dim, (cos.data_ptr(), sin.data_ptr())
        self._rotate(x.data_ptr(), num_tokens, stride, num_heads, head_dim, *tables, cos.shape[-1], scalar, threads)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        caches: Sequence[CacheView],
        out: torch.Tensor,
    ) -> None:
        """Attention of the new tokens of some sequences; their keys and values go into the caches first.

        query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim], elements of a head
        side by side, `out` as query and contiguous. The tokens of one sequence follow each other: each sees what was
        cached, those before it and itself, and of a prefix LM's prompt (`CacheView.num_visible`) all. What it gets
        depends neither on the others that come along nor on the number of threads, bit for bit.
        """
        assert len(query) == sum(cache.num_new for cache in caches)
        parts = (query, key, value)
        pointers = [part.data_ptr() for part in parts]
        strides = [part.stride(axis) for axis in (0, 1) for part in parts]
        sizes = (len(query), query.shape[1], key.shape[1], query.shape[2])
        call = _Attention(*pointers, *strides, *sizes, _caches(caches), out.data_ptr())
        self._attend(ctypes.addressof(call), SCALAR_TYPES[query.dtype], torch.get_num_threads())

    def layers(
        self,
        layers: ctypes.Array[ctypes.c_void_p],
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        sequences: Sequence[CachedSequence],
    ) -> torch.Tensor:
        """`layer.NativeStack`, the addresses of whose layers' structures are `layers`."""
        num_tokens = len(hidden)
        assert num_tokens == sum([sequence.num_new for sequence in sequences])
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        cached = array("q", [number for sequence in sequences for number in sequence])
        tables = (cos.data_ptr(), sin.data_ptr())
        threads = torch.get_num_threads()
        self._layers(
            *(layers, len(layers), hidden.data_ptr(), num_tokens, *tables),
            *(cached.buffer_info()[0], len(sequences), out.data_ptr(), threads),
        )
        return out

    def read(self, memory: torch.Tensor) -> None:
        """Read a tensor's memory, with as many threads as a product would use."""
        self._read(memory.data_ptr(), memory.numel() * memory.element_size(), torch.get_num_threads())


def _caches(views: Sequence[CacheView]) -> ctypes.Array[_Cache]:
    return (_Cache * len(views))(
        *[
            _Cache(v.keys.data_ptr(), v.values.data_ptr(), v.keys.shape[1], v.length, v.num_new, v.num_visible)
            for v in views
        ]
    )


def _function(function: Any, *argument_types: type) -> Any:
    function.restype, function.argtypes = None, argument_types
    return function


def _pointers(weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None) -> WeightPointers:
    if isinstance(weight, torch.Tensor):
        bits, scalar = 8 * weight.element_size(), SCALAR_TYPES[weight.dtype]
        return WeightPointers(weight.data_ptr(), None, _pointer(bias), *weight.shape, bits, scalar, 0)
    sizes = (weight.num_rows, weight.num_columns, weight.bits, SCALAR_TYPES[torch.float32], weight.is_exact)
    return WeightPointers(weight.values.data_ptr(), _pointer(weight.scales), _pointer(bias), *sizes)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def load_kernels(name: str) -> NativeKernels | None:
    """The kernels of one of `INSTRUCTION_SETS`; None if they were not built, or from other sources, or this processor
    lacks it."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_{name}{suffix}")
        if path.is_file():
            library = ctypes.CDLL(str(path))
            is_ours = hasattr(library, "glm_interface") and library.glm_interface() == _INTERFACE
            return NativeKernels(name, library) if is_ours and library.glm_supported() else None
    return None


@cache
def best_kernels() -> NativeKernels | None:
    """The kernels of the best instruction set at hand; None where none were built."""
    return next((kernels for name in INSTRUCTION_SETS if (kernels := load_kernels(name)) is not None), None)
