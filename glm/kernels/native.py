"""The native CPU kernels: libraries built at install time (setup.py), one for each instruction set, called by ctypes.

A product with few rows of activations costs what reading the weights costs. bf16 weights are multiplied by bf16
activations and summed in fp32. Integer weights enter exactly, and their products with fp32 activations are as exact as
torch's in fp32 (relative rms error 3e-7). AVX-512 has them by rounding activations to 24 bits, relative to the largest
of each 32 columns, and multiplying byte by byte. Where that is asked for, it takes 16 bits in two thirds of the time:
relative rms error 2e-5, a tenth of what fp16 activations would lose; the other libraries are exact always.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from glm.kernels.packed import GROUP_COLUMNS, PackedWeight, pack_scales, packed_shape
from glm.quantization import QuantizedWeight

# Best first.
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "portable")


class _Weight(ctypes.Structure):
    """Mirrors `Weight` in native/product.h."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("grouped", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class NativeWeight:
    """A weight as the kernels see it; `dtype` is that of activations, bias and result."""

    pointers: _Weight
    dtype: torch.dtype
    values: torch.Tensor
    scales: torch.Tensor | None
    bias: torch.Tensor | None


class NativeKernels:
    """The kernels of one instruction set."""

    def __init__(self, name: str, library: ctypes.CDLL) -> None:
        self.name = name
        self._product = library.glm_product
        self._product.restype = None
        self._product.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int] * 2)
        self._pack = library.glm_pack
        self._pack.restype = None
        self._pack.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_int,
        )
        self._read = library.glm_read
        self._read.restype = ctypes.c_uint64
        self._read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)

    def pack(self, weight: QuantizedWeight) -> PackedWeight | None:
        """The weight in the layout of the kernels, in memory of its own; None for a kind that they do not know."""
        scales, num_groups = weight.scales, weight.scales.shape[1]
        if num_groups > 1 and (weight.bits, num_groups * GROUP_COLUMNS) != (4, weight.num_columns):
            return None
        if weight.values.device.type != "cpu" or not weight.values.numel():
            return None
        source = weight.values.contiguous()
        values = torch.empty(packed_shape(weight), dtype=torch.uint8)
        size = (weight.num_rows, weight.num_columns)
        self._pack(source.data_ptr(), *size, weight.bits, values.data_ptr(), torch.get_num_threads())
        dtype = torch.float16 if num_groups > 1 else torch.float32
        return PackedWeight(values, pack_scales(scales.to(dtype)), weight.bits, *size)

    def prepare(self, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None) -> NativeWeight | None:
        """What `product` takes, pointing at the same memory; None for a kind of weight that it does not know."""
        if isinstance(weight, PackedWeight):
            values, dtype = weight.values, torch.float32
            scales: torch.Tensor | None = weight.scales
            size = (weight.num_rows, weight.num_columns, weight.bits, weight.scales.shape[1] > 1)
        else:
            values, scales, dtype = weight, None, torch.bfloat16
            size = (weight.shape[0], weight.shape[1], 16, False)
            if weight.dtype != dtype or weight.device.type != "cpu" or not weight.is_contiguous() or not weight.numel():
                return None
        if bias is not None and bias.dtype != dtype:
            return None
        pointers = _Weight(values.data_ptr(), _pointer(scales), _pointer(bias), *size)
        return NativeWeight(pointers, dtype, values, scales, bias)

    def product(self, x: torch.Tensor, weight: NativeWeight, exact: bool = True) -> torch.Tensor:
        """x [num_tokens, columns] times the weight [rows, columns], plus its bias -> [num_tokens, rows].

        Both in bf16 for a bf16 weight, in fp32 for an integer one; of the latter, `exact` products or faster ones. A
        row of the result depends on its row of `x` alone, bit for bit, and on no number of threads.
        """
        assert x.dtype == weight.dtype and x.shape[1] == weight.pointers.columns
        x = x.contiguous()
        out = torch.empty(x.shape[0], weight.pointers.rows, dtype=x.dtype)
        threads = torch.get_num_threads()
        self._product(
            ctypes.addressof(weight.pointers), x.data_ptr(), x.shape[0], out.data_ptr(), 3 if exact else 2, threads
        )
        return out

    def read(self, memory: torch.Tensor) -> None:
        """Read a tensor's memory, with as many threads as a product would use."""
        self._read(memory.data_ptr(), memory.numel() * memory.element_size(), torch.get_num_threads())


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def load_kernels(name: str) -> NativeKernels | None:
    """The kernels of one of `INSTRUCTION_SETS`; None if they were not built or this processor lacks it."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_{name}{suffix}")
        if path.is_file():
            library = ctypes.CDLL(str(path))
            return NativeKernels(name, library) if library.glm_supported() else None
    return None


@cache
def best_kernels() -> NativeKernels | None:
    """The kernels of the best instruction set at hand; None where none were built."""
    return next((kernels for name in INSTRUCTION_SETS if (kernels := load_kernels(name)) is not None), None)
