"""Tensors as they travel: a descriptor in the header, the bytes in a frame of their own, never copied here."""

from math import prod
from typing import Any

from protocol.errors import TensorError
from protocol.limits import MAX_STEP_BYTES, MAX_TENSOR_DIM, MAX_TENSOR_RANK
from protocol.records import Record

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1}
FLOAT_DTYPES = frozenset({"float32", "float16", "bfloat16"})


class RawTensor(Record, frozen=True):
    """Row-major, little-endian values in a buffer that belongs to somebody else. Raises TensorError."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        shape, data = self.shape, self.data
        actual = len(data) if type(data) is bytes else memoryview(data).nbytes
        is_right = prod(shape) * ITEM_SIZES.get(self.dtype, -1) == actual <= MAX_STEP_BYTES
        if is_right and len(shape) <= MAX_TENSOR_RANK and (not shape or min(shape) >= 0):
            return
        expected = checked_num_bytes(self.dtype, shape)
        raise TensorError(f"{self.dtype} {list(shape)} takes {expected} bytes, the frame has {actual}")

    @property
    def num_bytes(self) -> int:
        """Of the buffer."""
        return len(self.data) if type(self.data) is bytes else memoryview(self.data).nbytes


def checked_num_bytes(dtype: Any, shape: tuple[Any, ...]) -> int:
    """Bytes of such a tensor, after all limits were checked; anything may have been sent as dtype and dimensions."""
    if type(dtype) is not str or dtype not in ITEM_SIZES:
        raise TensorError(f"dtype {dtype!r:.40} is none of {', '.join(ITEM_SIZES)}")
    if len(shape) > MAX_TENSOR_RANK:
        raise TensorError(f"{len(shape)} dimensions, at most {MAX_TENSOR_RANK} are allowed")
    for dim in shape:
        if type(dim) is not int or not 0 <= dim <= MAX_TENSOR_DIM:
            raise TensorError(f"a dimension is {type(dim).__name__} or not in 0..{MAX_TENSOR_DIM}")
    num_bytes: int = prod(shape) * ITEM_SIZES[dtype]
    if num_bytes > MAX_STEP_BYTES:
        raise TensorError(f"{dtype} {list(shape)} takes {num_bytes} bytes, at most {MAX_STEP_BYTES} are allowed")
    return num_bytes
