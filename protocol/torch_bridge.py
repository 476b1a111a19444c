"""torch.Tensor <-> RawTensor; the only module here that knows torch, imported only by those who have tensors."""

import ctypes

import torch

from protocol.errors import TensorError
from protocol.tensors import RawTensor

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ALIGNMENT = 64
_SMALL_BYTES = 1 << 16
"""Copied rather than shared: one token's hidden state is copied sooner than views of it are made."""


def to_raw(tensor: torch.Tensor) -> RawTensor:
    """A view of a CPU tensor's memory, or a copy of what is small, elsewhere or not contiguous. Do not write to it."""
    name = _NAMES.get(tensor.dtype)
    if name is None:
        raise TensorError(f"a tensor of {tensor.dtype} cannot travel: convert it to one of {', '.join(_DTYPES)}")
    if not (tensor.is_cpu and tensor.is_contiguous()):
        tensor = tensor.detach().cpu().contiguous()
    num_bytes = tensor.nbytes
    data = ctypes.string_at(tensor.data_ptr(), num_bytes) if num_bytes <= _SMALL_BYTES else _bytes_of(tensor.detach())
    return RawTensor(name, tuple(tensor.shape), data)


def from_raw(raw: RawTensor, device: torch.device | str = "cpu") -> torch.Tensor:
    """The values on `device`, in memory that may be written to.

    Shares a large, writable, aligned buffer; copies others, since kernels may round differently on unaligned memory and
    the same bytes must give the same result wherever they landed.
    """
    view = memoryview(raw.data)
    if view.nbytes > _SMALL_BYTES and not view.readonly:
        shared = torch.frombuffer(view, dtype=_DTYPES[raw.dtype]).reshape(raw.shape)
        if shared.data_ptr() % _ALIGNMENT == 0:
            return shared.to(device)
    tensor = torch.empty(raw.shape, dtype=_DTYPES[raw.dtype])
    if view.nbytes <= _SMALL_BYTES:
        ctypes.memmove(tensor.data_ptr(), bytes(view), view.nbytes)
    else:
        _bytes_of(tensor)[:] = view.cast("B")
    return tensor if device == "cpu" else tensor.to(device)


class Landing:
    """Where one small tensor after another lands, in memory that is made once for all of the same kind.

    What `take` gives is good until it is called again: for those who are done with a tensor, and have copied what came
    of it, before they take the next.
    """

    def __init__(self) -> None:
        self._kind: tuple[str, tuple[int, ...]] | None = None
        self._tensor = torch.empty(0)
        self._bytes = _bytes_of(self._tensor)

    def take(self, raw: RawTensor) -> torch.Tensor:
        """As `from_raw`, on the CPU."""
        if (raw.dtype, raw.shape) != self._kind:
            tensor = from_raw(raw)
            if tensor.nbytes <= _SMALL_BYTES:
                self._kind, self._tensor, self._bytes = (raw.dtype, raw.shape), tensor, _bytes_of(tensor)
            return tensor
        self._bytes[:] = raw.data
        return self._tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data
