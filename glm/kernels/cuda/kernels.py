"""The CUDA kernels for one card and one kind of activations, as linear layers and blocks call them."""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch.nn import functional

from glm.errors import MissingKernelsError
from glm.kernels.cuda.cubins import cubin
from glm.kernels.cuda.libraries import LaunchLayer, launch_layer
from glm.quantization import QuantizedWeight

MOST_FUSED_TOKENS = 8
"""Tokens that one pass over the weight can serve. Where it stops to pay is for benchmarks/gpu.py to say on a card."""

# What kernels.cu calls them, and how it divides work.
_ACTIVATIONS = {torch.float16: "Half", torch.bfloat16: "Bfloat", torch.float32: "Single"}
_FUSED_TOKENS = (1, 2, 4, 8)
_PRODUCT_ROWS, _PRODUCT_THREADS, _STEP_THREADS = 4, 128, 256
_CHUNK_BYTES = 16
_GROUP_COLUMNS = 32
_OLDEST = (6, 1)
# Dequantised weights are 64 MiB at most in 16 bits: little beside what a card holds, much for a matmul.
_BUFFER_ELEMENTS = 32 << 20


class _Product(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("values", "scales", "bias", "x", "out")],
        *[(name, ctypes.c_int) for name in ("rows", "columns", "tokens")],
    )


class _Dequantise(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("values", "scales", "out")],
        *[(name, ctypes.c_int) for name in ("rows", "columns")],
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "weight", "out")],
        ("eps", ctypes.c_float),
        ("size", ctypes.c_int),
    )


class _Gate(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("out", ctypes.c_void_p), ("tokens", ctypes.c_int), ("size", ctypes.c_int))


class _Rotate(ctypes.Structure):
    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("x", "cosines", "sines")],
        *[(name, ctypes.c_int) for name in ("tokens", "stride", "heads", "head_dim", "pairs")],
    )


class KernelModule(Protocol):
    """Compiled kernels that can be launched."""

    def launch(self, name: str, num_blocks: int, num_threads: int, arguments: ctypes.Structure) -> None:
        """Start a kernel behind what torch has started before, and do not wait for it."""


class DeviceModule:
    """A binary loaded on a card, in the context and on the stream that torch uses there."""

    def __init__(self, layer: LaunchLayer, device: torch.device, binary: bytes) -> None:
        self._driver, self._device = layer.driver, device
        self._functions: dict[str, Any] = {}
        self._bound = threading.local()
        with torch.cuda.device(device):
            self._bind_thread()
            self._module = self._driver.cuModuleLoadData(binary)

    def launch(self, name: str, num_blocks: int, num_threads: int, arguments: ctypes.Structure) -> None:
        """As `KernelModule.launch`.

        Raises:
            RuntimeError: the driver refuses.
        """
        with torch.cuda.device(self._device):
            self._bind_thread()
            function = self._functions.get(name)
            if function is None:
                function = self._functions[name] = self._driver.cuModuleGetFunction(self._module, name)
            stream = torch.cuda.current_stream(self._device).cuda_stream
            parameters = [ctypes.addressof(arguments)]
            self._driver.cuLaunchKernel(function, num_blocks, 1, 1, num_threads, 1, 1, 0, stream, parameters)

    def _bind_thread(self) -> None:
        """Make torch's context this thread's: the driver, unlike torch, does not do that by itself."""
        if not getattr(self._bound, "done", False):
            torch.zeros(1, device=self._device)
            self._bound.done = True


@dataclass(frozen=True, slots=True)
class CudaWeight:
    """A weight as the kernels read it: `scales` in fp16 for groups, in fp32 for one a row."""

    weight: QuantizedWeight
    bias: torch.Tensor | None
    kind: str
    product: _Product

    @property
    def num_bytes(self) -> int:
        """Bytes of values, scales and bias."""
        return self.weight.num_bytes + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())


class CudaKernels:
    """All kernels, for tensors of one dtype on one device; not for several threads at once."""

    def __init__(self, module: KernelModule, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._module = module

    def prepare(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> CudaWeight | None:
        """What the products take, holding the same integers; None for a kind of weight that they do not know."""
        num_groups, columns = weight.scales.shape[1], weight.num_columns
        if num_groups > 1 and (weight.bits, num_groups * _GROUP_COLUMNS) != (4, columns):
            return None
        values, scales = weight.values, weight.scales
        if values.device != self.device or not values.numel() or values.shape[1] % _CHUNK_BYTES:
            return None
        if not values.is_contiguous() or values.data_ptr() % _CHUNK_BYTES:
            values = values.clone(memory_format=torch.contiguous_format)
        if bias is not None and bias.dtype != self.dtype:
            return None
        bias = None if bias is None else bias.contiguous()
        scales = scales.to(torch.float16 if num_groups > 1 else torch.float32).contiguous()
        kind = "grouped_int4" if num_groups > 1 else f"int{weight.bits}"
        pointers = (values.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr())
        product = _Product(*pointers, None, None, weight.num_rows, columns, 0)
        return CudaWeight(QuantizedWeight(values, scales, weight.bits), bias, kind, product)

    def product(self, x: torch.Tensor, weight: CudaWeight) -> torch.Tensor:
        """x [at most MOST_FUSED_TOKENS, columns] times the weight, plus its bias -> [num_tokens, rows].

        Reads the weight once, sums in fp32. A row of the result depends on its row of `x` alone, bit for bit.
        """
        num_tokens, num_rows = x.shape[0], weight.weight.num_rows
        assert x.dtype == self.dtype and x.shape[1] == weight.weight.num_columns and num_tokens <= MOST_FUSED_TOKENS
        x, out = _aligned(x), torch.empty(num_tokens, num_rows, dtype=self.dtype, device=self.device)
        if num_tokens:
            call = weight.product
            call.x, call.out, call.tokens = x.data_ptr(), out.data_ptr(), num_tokens
            entry = next(count for count in _FUSED_TOKENS if count >= num_tokens)
            num_blocks = -(-num_rows // _PRODUCT_ROWS)
            self._module.launch(f"product_{weight.kind}_{entry}", num_blocks, _PRODUCT_THREADS, call)
        return out

    def product_by_blocks(self, x: torch.Tensor, weight: CudaWeight) -> torch.Tensor:
        """The same for many tokens: rows are dequantised into a buffer, as many as fit, and torch multiplies."""
        num_rows, columns = weight.weight.num_rows, weight.weight.num_columns
        step = min(num_rows, max(1, _BUFFER_ELEMENTS // columns))
        # torch's allocator gives the memory of the last one again, and knows when the stream is done with it.
        buffer = torch.empty(step, columns, dtype=self.dtype, device=self.device)
        if step == num_rows:
            self._dequantise(weight, 0, num_rows, buffer)
            return functional.linear(x, buffer, weight.bias)
        out = torch.empty(x.shape[0], num_rows, dtype=self.dtype, device=self.device)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            part = buffer[: rows.stop - start]
            self._dequantise(weight, start, rows.stop, part)
            out[:, rows] = functional.linear(x, part, None if weight.bias is None else weight.bias[rows])
        return out

    def _dequantise(self, weight: CudaWeight, start: int, end: int, out: torch.Tensor) -> None:
        values, scales = weight.weight.values[start:end], weight.weight.scales[start:end]
        sizes = (end - start, weight.weight.num_columns)
        call = _Dequantise(values.data_ptr(), scales.data_ptr(), out.data_ptr(), *sizes)
        self._step(f"dequantise_{weight.kind}", out.numel() // 8, call)

    def can_step(self, example: torch.Tensor) -> bool:
        """Whether the functions below compute with tensors like this one."""
        return (example.device, example.dtype) == (self.device, self.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[num_tokens, size] -> the same: `norm.RMSNorm` in one pass."""
        x = x.contiguous()
        out = torch.empty_like(x)
        call = _Norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), eps, x.shape[1])
        if x.numel():
            self._module.launch("rms_norm", x.shape[0], _STEP_THREADS, call)
        return out

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * size] -> [num_tokens, size]: SiLU of the first half times the second."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
        self._step("gate", out.numel(), _Gate(x.data_ptr(), out.data_ptr(), *out.shape))
        return out

    def rotate(self, x: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate neighbours in the first heads of x [num_tokens, more heads, head_dim], in place.

        `cos` and `sin`: fp32 [num_tokens, ..., pairs], as in `rotary.RotaryTable` for one-dimensional positions.
        """
        num_tokens, all_heads, head_dim = x.shape
        assert x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        sizes = (num_tokens, all_heads * head_dim, num_heads, head_dim, cos.shape[-1])
        call = _Rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), *sizes)
        self._step("rotate", num_tokens * num_heads * cos.shape[-1], call)

    def _step(self, name: str, num_threads: int, call: ctypes.Structure) -> None:
        if num_threads:
            self._module.launch(name, -(-num_threads // _STEP_THREADS), _STEP_THREADS, call)


@dataclass(frozen=True, slots=True)
class MissingKernels:
    """Why there are no kernels for a device, and the remedy."""

    reason: str


@cache
def cuda_kernels(device: torch.device, dtype: torch.dtype) -> CudaKernels | MissingKernels:
    """The kernels for tensors of a dtype on a card; compiled at the first call on a machine, which takes seconds."""
    try:
        return _load(device, dtype, launch_layer)
    except MissingKernelsError as error:
        return MissingKernels(str(error))


def _load(device: torch.device, dtype: torch.dtype, layer: Callable[[], LaunchLayer]) -> CudaKernels:
    if torch.version.cuda is None:
        raise MissingKernelsError("this torch is not built for CUDA", "install one that is")
    device = _with_index(device)
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        name = f"sm_{capability[0]}{capability[1]}"
        raise MissingKernelsError(f"the card is too old ({name})", "use one from sm_61 on")
    parts = layer()
    binary = cubin(parts.nvrtc, capability, _ACTIVATIONS[dtype])
    try:
        return CudaKernels(DeviceModule(parts, device, binary), device, dtype)
    except (RuntimeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise MissingKernelsError(f"the driver refuses the kernels ({reason})", "update NVIDIA's driver") from None


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as the tensors on it name it."""
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % _CHUNK_BYTES == 0 else x.clone()
