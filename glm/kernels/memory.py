"""Memory for weights: large pages, where the system gives them, are read a tenth faster than small ones."""

import ctypes
import math
import sys
from collections.abc import Sequence

import torch

_PAGE_BYTES = 2 << 20
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty_weight(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor in CPU memory; from 2 MiB on it starts on a large page's boundary and asks for such."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if _libc is None or num_bytes < _PAGE_BYTES:
        return torch.empty(shape, dtype=dtype)
    memory = torch.empty(num_bytes + _PAGE_BYTES, dtype=torch.uint8)  # what is never touched takes no memory
    start = -memory.data_ptr() % _PAGE_BYTES
    whole = num_bytes // _PAGE_BYTES * _PAGE_BYTES
    # Advice: where it is refused, memory is as good as before. Memory that was used before has its small pages, which
    # are given back first: a tenth of a layer's weights would otherwise lie there.
    for advice in (_MADV_HUGEPAGE, _MADV_DONTNEED):
        _libc.madvise(ctypes.c_void_p(memory.data_ptr() + start), ctypes.c_size_t(whole), advice)
    return memory[start : start + num_bytes].view(dtype).view(shape)
