"""The kinds of linear layer, with one call: `[num_tokens, in_features] -> [num_tokens, out_features]`.

A faster way to multiply by a kind of weight is one class more here, and nothing else.
"""

from typing import Protocol

import torch
from torch.nn import functional

from glm.kernels.cuda.kernels import MOST_FUSED_TOKENS, CudaKernels, CudaWeight, MissingKernels
from glm.kernels.memory import empty_weight
from glm.kernels.native import NativeKernels, NativeWeight
from glm.kernels.packed import PackedWeight
from glm.precision import Precision
from glm.quantization import QuantizedWeight, quantize, unpack_int4

Weight = torch.Tensor | QuantizedWeight | PackedWeight
Kernels = NativeKernels | CudaKernels | MissingKernels | None


class Linear(Protocol):
    """What blocks and ends need of a linear layer."""

    @property
    def num_bytes(self) -> int:
        """Bytes of weight, scales and bias."""

    @property
    def path(self) -> str:
        """Which arithmetic it takes, for people."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features], both in the compute dtype."""


class DenseLinear:
    """A float weight [out_features, in_features] in the compute dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.weight, self.bias)

    @property
    def path(self) -> str:
        return f"torch matmul, {_name(self.weight.dtype)}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)


class QuantizedLinear:
    """Integer weights, dequantised a cache-sized block of rows at a time, of a kind that kernels do not multiply as it
    is: the blocks are multiplied by the native ones where there are such, else by torch; `note` says why."""

    def __init__(
        self, weight: QuantizedWeight, bias: torch.Tensor | None, kernels: NativeKernels | None = None, note: str = ""
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._kernels = kernels
        self._note = f" ({note})" if note else ""
        self._blocks = weight.row_blocks()

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes + tensor_bytes(self.bias)

    @property
    def path(self) -> str:
        return f"torch dequantise + {f'native {self._kernels.name}' if self._kernels else 'matmul'}{self._note}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], self.weight.num_rows)
        for block in self._blocks:
            out[:, block] = make_linear(self.weight.rows(block).dequantize(x.dtype), None, self._kernels)(x)
        return out if self.bias is None else out.add_(self.bias)


class NativeLinear:
    """A float or packed weight in CPU memory, multiplied by the native kernels, whatever the number of tokens: another
    arithmetic for many of them would give a token other bits in other company."""

    def __init__(self, weight: torch.Tensor | PackedWeight, native: NativeWeight, kernels: NativeKernels) -> None:
        self.weight = weight
        self.native = native
        self.kernels = kernels

    @property
    def num_bytes(self) -> int:
        return tensor_bytes(self.native.values, self.native.scales, self.native.bias)

    @property
    def path(self) -> str:
        return f"native {self.kernels.name}, {_name(self.native.dtype)}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.product(x, self.native)


class CudaLinear:
    """Integer weights on a card: read once for few tokens, dequantised for torch's matmul for many."""

    def __init__(self, weight: CudaWeight, kernels: CudaKernels) -> None:
        self.weight = weight
        self.kernels = kernels

    @property
    def num_bytes(self) -> int:
        return self.weight.num_bytes

    @property
    def path(self) -> str:
        return f"CUDA kernels, {_name(self.kernels.dtype)}"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        fused = x.shape[0] <= MOST_FUSED_TOKENS
        return (self.kernels.product if fused else self.kernels.product_by_blocks)(x, self.weight)


def make_weight(
    stored: torch.Tensor | QuantizedWeight, precision: Precision, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | QuantizedWeight:
    """A weight [rows, columns] at a precision, from what a checkpoint holds (which may be a view of a mapped file).

    The result owns its memory. A published quantised weight keeps its integers and scales at its own precision, and
    int4 at int8 too; otherwise it is dequantised, a block of rows at a time.
    """
    if isinstance(stored, QuantizedWeight) and stored.bits <= precision.bits and precision.is_quantized:
        values, scales = (owned(t, t.dtype, device) for t in (stored.values, stored.scales))
        values = values if stored.bits == precision.bits else unpack_int4(values)
        return QuantizedWeight(values, scales, precision.bits, stored.is_exact)
    if precision.is_quantized:
        return quantize(stored, precision, device)
    if isinstance(stored, QuantizedWeight):
        dense = torch.empty(stored.num_rows, stored.num_columns, dtype=dtype, device=device)
        for block in stored.row_blocks():
            dense[block] = stored.rows(block).dequantize(dtype)
        return dense
    return owned(stored, dtype, device)


def pack(weight: Weight, kernels: Kernels) -> Weight:
    """A quantised weight in the layout of the kernels, where they have one of their own; any other as it is."""
    if not isinstance(kernels, NativeKernels) or not isinstance(weight, QuantizedWeight):
        return weight
    packed = kernels.pack(weight)
    return weight if packed is None else packed


def make_linear(weight: Weight, bias: torch.Tensor | None, kernels: Kernels) -> Linear:
    """The linear layer for a weight as `make_weight` or `pack` returns it, with `kernels` where they know its kind."""
    weight = pack(weight, kernels)
    if isinstance(weight, QuantizedWeight):
        return _quantized_linear(weight, bias, kernels)
    if isinstance(kernels, NativeKernels):
        native = kernels.prepare(weight, bias)
        if native is not None:
            return NativeLinear(weight, native, kernels)
    assert not isinstance(weight, PackedWeight), "packed weights need kernels"
    return DenseLinear(weight, bias)


def _quantized_linear(weight: QuantizedWeight, bias: torch.Tensor | None, kernels: Kernels) -> Linear:
    if isinstance(kernels, CudaKernels):
        prepared = kernels.prepare(weight, bias)
        if prepared is not None:
            return CudaLinear(prepared, kernels)
    native = kernels if isinstance(kernels, NativeKernels) and weight.values.device.type == "cpu" else None
    return QuantizedLinear(weight, bias, native, kernels.reason if isinstance(kernels, MissingKernels) else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def owned(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous copy that does not hold on to a mapped file."""
    if device.type != "cpu":
        return tensor.to(device=device, dtype=dtype, copy=True).contiguous()
    return empty_weight(tensor.shape, dtype).copy_(tensor)


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of the tensors that are there."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
