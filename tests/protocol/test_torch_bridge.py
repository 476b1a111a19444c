"""Tensors keep their bits on the way through frames."""

import pytest
import torch

from protocol.errors import TensorError
from protocol.tensors import RawTensor
from protocol.torch_bridge import from_raw, to_raw

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (3, 4, 2), (), (20, 4096)], ids=str)
def test_bits_survive(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Tensor to raw and back is the same tensor, from writable and read-only buffers."""
    tensor = (torch.rand(shape) * 200).to(dtype)
    raw = to_raw(tensor)
    assert torch.equal(from_raw(raw), tensor)
    read_only = RawTensor(raw.dtype, raw.shape, bytes(raw.data))
    again = from_raw(read_only)
    assert again.dtype == dtype
    assert torch.equal(again, tensor)
    again.zero_()
    assert bytes(read_only.data) == bytes(raw.data)


def test_large_views_are_not_copied_but_strides_are_made_plain() -> None:
    """A large contiguous tensor's own memory travels; a transposed one travels row by row."""
    large = torch.zeros(20, 4096)
    shared = from_raw(to_raw(large))
    assert shared.data_ptr() == large.data_ptr()
    tensor = torch.arange(6.0).reshape(2, 3)
    assert from_raw(to_raw(tensor.T)).tolist() == tensor.T.tolist()


def test_unaligned_buffers_are_realigned() -> None:
    """Frames land anywhere in a receive buffer; kernels get aligned memory all the same."""
    for num_rows in (2, 20_000):
        buffer = memoryview(bytearray(num_rows * 4 * 4 + 1))[1:]
        tensor = from_raw(RawTensor("float32", (num_rows, 4), buffer))
        assert tensor.data_ptr() % 64 == 0
        assert tensor.tolist() == [[0.0] * 4] * num_rows


def test_other_dtypes_are_refused() -> None:
    """A dtype that has no name on the wire says which have."""
    with pytest.raises(TensorError, match=r"torch.float64 cannot travel: .*float32"):
        to_raw(torch.zeros(2, dtype=torch.float64))
