"""What the CUDA kernels compute, run on a CPU by an emulation of a block's threads, against torch.

What only a card can show is not here: speed, and what its compiler and memory do.
"""

import mmap
from ctypes import CDLL, c_int, c_size_t, c_void_p
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from glm.kernels.cuda import kernels as cuda
from glm.kernels.cuda.kernels import MOST_FUSED_TOKENS, CudaKernels, MissingKernels
from glm.linear import CudaLinear, QuantizedLinear, make_linear
from glm.norm import RMSNorm
from glm.precision import Precision
from glm.quantization import QuantizedWeight, pack_int4, quantize
from glm.rotary import RotaryTable, rotate_neighbours
from tests.glm.kernels.cuda_emulation import COMPILER, DTYPES, EmulatedModule, emulated_kernels

KINDS = ("int8", "int4", "int4 a scale per row")
EXACT = 2e-6  # error of a sum in fp32, relative to the root of the sum of the squares of its terms

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here to build the emulation with")
for_all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
for_all_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("emulated")
    return cache(lambda dtype: emulated_kernels(folder, dtype))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, num_rows: int, num_columns: int) -> QuantizedWeight:
    weight = normal(num_rows, num_columns) / num_columns**0.5
    if kind != "int4 a scale per row":
        return quantize(weight, Precision(kind))
    integers = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    return QuantizedWeight(pack_int4(integers), weight.abs().amax(1, keepdim=True).to(torch.float16) / 7, 4)


def launched(kernels: CudaKernels) -> list[str]:
    module = kernels._module
    assert isinstance(module, EmulatedModule)
    return module.launched


def check(found: torch.Tensor, x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> None:
    """Every result is the sum as fp32 has it, rounded once to the dtype of x."""
    exact, wide = weight.dequantize(torch.float64), x.double()
    wanted, squares = wide @ exact.t(), wide.square() @ exact.square().t()
    if bias is not None:
        wanted, squares = wanted + bias.double(), squares + bias.double().square()
    assert (found.shape, found.dtype) == (wanted.shape, x.dtype)
    bound = torch.finfo(x.dtype).eps / 2 * wanted.abs() + EXACT * squares.sqrt() + torch.finfo(x.dtype).tiny
    assert ((found.double() - wanted).abs() <= bound).all()


@for_all_dtypes
@for_all_kinds
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, MOST_FUSED_TOKENS), rows=st.integers(1, 13), groups=st.integers(1, 40), biased=st.booleans()
)
def test_any_shape(emulated, dtype: torch.dtype, kind: str, tokens: int, rows: int, groups: int, biased: bool) -> None:
    """The product with the dequantised weight and the bias, whatever does not divide into what; summed in fp32."""
    weight = make(kind, rows, 32 * groups)
    x, bias = normal(tokens, 32 * groups, seed=2).to(dtype), normal(rows, seed=3).to(dtype) if biased else None
    linear = make_linear(weight, bias, emulated(dtype))
    assert isinstance(linear, CudaLinear)
    check(linear(x), x, weight, bias)


@for_all_dtypes
@for_all_kinds
@pytest.mark.parametrize("columns", [4096, 13696])
def test_real_widths(emulated, dtype: torch.dtype, kind: str, columns: int) -> None:
    """Several turns of the loop over columns, the last one not full."""
    weight, x = make(kind, 6, columns), normal(3, columns, seed=2).to(dtype)
    check(make_linear(weight, None, emulated(dtype))(x), x, weight)


@for_all_dtypes
@for_all_kinds
def test_a_token_is_computed_as_if_alone(emulated, dtype: torch.dtype, kind: str) -> None:
    """Bit for bit, in any company that one pass serves."""
    linear = make_linear(make(kind, 9, 1184), normal(9).to(dtype), emulated(dtype))
    x = normal(MOST_FUSED_TOKENS, 1184).to(dtype)
    alone = torch.cat([linear(row) for row in x.split(1)])
    for count in range(1, MOST_FUSED_TOKENS + 1):
        assert torch.equal(linear(x[:count]), alone[:count])


def check_sums_of_torch(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """In whatever order the processor at hand adds up in fp32: n products and a bias are n roundings at most, each of
    half a unit in the last place of what the magnitudes come to; and two to the dtype, without the bias and with it."""
    magnitudes = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    sums = x.double() @ weight.double().t()
    wanted = sums + bias.double()
    bound = x.shape[1] * torch.finfo(torch.float32).eps / 2 * magnitudes
    bound += torch.finfo(x.dtype).eps * (sums.abs() + wanted.abs()) + torch.finfo(x.dtype).tiny
    assert ((found.double() - wanted).abs() <= bound).all()


@for_all_dtypes
@for_all_kinds
@pytest.mark.parametrize("buffer_rows", [3, 7, 100])
def test_many_tokens(
    emulated, dtype: torch.dtype, kind: str, buffer_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dequantised exactly as torch does it, in one piece or in several."""
    monkeypatch.setattr(cuda, "_BUFFER_ELEMENTS", 96 * buffer_rows)
    weight, bias, x = make(kind, 10, 96), normal(10).to(dtype), normal(MOST_FUSED_TOKENS + 1, 96).to(dtype)
    kernels = emulated(dtype)
    linear = make_linear(weight, bias, kernels)
    before = len(launched(kernels))
    check_sums_of_torch(linear(x), x, weight.dequantize(dtype), bias)
    assert len(launched(kernels)) - before == -(-10 // buffer_rows)
    buffer = torch.empty(10, 96, dtype=dtype)
    kernels._dequantise(linear.weight, 0, 10, buffer)
    assert torch.equal(buffer, weight.dequantize(dtype))


@for_all_kinds
def test_every_integer_is_decoded(emulated, kind: str) -> None:
    """All values at all places of a chunk, the ends of the range too: with one-hot activations nothing rounds."""
    columns, bits = (16, 8) if kind == "int8" else (64, 4)
    low = -(1 << bits - 1)
    integers = (torch.arange(1 << bits).view(-1, 1) + torch.arange(columns)) % (1 << bits) + low
    values = integers.to(torch.int8) if bits == 8 else pack_int4(integers.to(torch.int8))
    num_groups = 2 if kind == "int4" else 1
    scales = torch.full((len(values), num_groups), 0.5, dtype=torch.float16)
    linear = make_linear(QuantizedWeight(values, scales, bits), None, emulated(torch.float32))
    found = torch.cat([linear(x) for x in torch.eye(columns).split(MOST_FUSED_TOKENS)])
    assert torch.equal(found.t(), integers * 0.5)


@for_all_kinds
def test_the_weight_exists_once(emulated, kind: str) -> None:
    """The layer holds the very integers it was given, and counts them once."""
    weight = make(kind, 5, 96)
    linear = make_linear(weight, None, emulated(torch.float16))
    assert linear.weight.weight.values.data_ptr() == weight.values.data_ptr()
    assert linear.num_bytes - weight.values.numel() == linear.weight.weight.scales.numel() * (
        2 if kind == "int4" else 4
    )


def test_other_kinds_are_left_to_torch(emulated) -> None:
    """Rows that are no whole chunks, and groups of other sizes; and the reason where there are no kernels."""
    kernels = emulated(torch.float32)
    for weight in (make("int8", 4, 40), make("int4", 4, 48), make("int4 a scale per row", 4, 40)):
        linear = make_linear(weight, None, kernels)
        assert isinstance(linear, QuantizedLinear)
        assert linear.path == "torch dequantise + matmul"
    linear = make_linear(make("int8", 4, 64), None, MissingKernels("libnvrtc is missing: pip install it"))
    assert linear.path == "torch dequantise + matmul (libnvrtc is missing: pip install it)"


@for_all_kinds
@for_all_dtypes
@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_beyond_the_tensors_is_touched(emulated, dtype: torch.dtype, kind: str, tokens: int) -> None:
    """Every tensor ends where forbidden memory begins."""
    kernels, weight = emulated(dtype), make(kind, 5, 2080)
    scales = weight.scales if kind == "int4" else weight.scales.to(torch.float32)
    prepared = kernels.prepare(QuantizedWeight(fenced(weight.values), fenced(scales), weight.bits), None)
    assert prepared is not None
    x, out = fenced(normal(tokens, 2080).to(dtype)), fenced(torch.full((tokens, 5), torch.nan, dtype=dtype))
    call = prepared.product
    call.x, call.out, call.tokens = x.data_ptr(), out.data_ptr(), tokens
    entry = 1 if tokens == 1 else 4
    kernels._module.launch(f"product_{prepared.kind}_{entry}", 2, 128, call)
    assert torch.equal(out, kernels.product(x, prepared))
    dense = fenced(torch.empty(5, 2080, dtype=dtype))
    kernels._dequantise(prepared, 0, 5, dense)
    assert torch.equal(dense, weight.dequantize(dtype))


def fenced(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one before a page that must not be touched."""
    num_bytes = tensor.numel() * tensor.element_size()
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    copy = torch.frombuffer(memory, dtype=torch.uint8)[size - num_bytes : size]
    fence = copy.data_ptr() + num_bytes
    assert CDLL(None).mprotect(c_void_p(fence), c_size_t(mmap.PAGESIZE), c_int(0)) == 0
    return copy.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@for_all_dtypes
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(0, 3), size=st.integers(1, 600))
def test_norm(emulated, dtype: torch.dtype, tokens: int, size: int) -> None:
    """As the norm that torch computes, to the last digit of the dtype or the one before."""
    x, weight = (5 * normal(tokens, size)).to(dtype), normal(size, seed=1).to(dtype)
    found = RMSNorm(weight, 1e-5, emulated(dtype))(x)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, RMSNorm(weight, 1e-5)(x), rtol=tolerance, atol=tolerance)


@for_all_dtypes
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(0, 3), size=st.integers(1, 300))
def test_gate(emulated, dtype: torch.dtype, tokens: int, size: int) -> None:
    """SiLU of the first half times the second, rounded once; for large values of either sign too."""
    x = (30 * normal(tokens, 2 * size)).to(dtype)
    first, second = x.double().chunk(2, dim=-1)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        emulated(dtype).gate(x).double(), functional.silu(first) * second, rtol=tolerance, atol=tolerance
    )


@for_all_dtypes
@settings(deadline=None, max_examples=20)
@given(tokens=st.integers(1, 3), heads=st.integers(1, 3), others=st.integers(0, 2), pairs=st.integers(1, 20))
def test_rotation(emulated, dtype: torch.dtype, tokens: int, heads: int, others: int, pairs: int) -> None:
    """The first heads' first pairs turn, all else stays."""
    x = normal(tokens, heads + others, 2 * pairs + 6).to(dtype)
    angles = 10 * normal(tokens, 1, 1, pairs, seed=1)
    table = RotaryTable(angles.cos(), angles.sin())
    wanted = torch.cat((rotate_neighbours(x[:, :heads], table), x[:, heads:]), dim=1)
    emulated(dtype).rotate(x, heads, table.cos, table.sin)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(x, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(emulated, dtype: torch.dtype) -> None:
    """As torch rounds: ties to even, through infinity, small numbers, both zeros and NaN."""
    x = torch.tensor([0.0, -0.0, 1e-8, -6e-8, 3e-5, 65504, 65519, 65520, 1e38, 3.4e38, -torch.inf, torch.nan])
    ties = torch.arange(0x3F800000, 0x3F800000 + (1 << 18), 1 << 11, dtype=torch.int32).view(torch.float32)
    x = torch.cat((x, ties))
    x = functional.pad(x, (0, -len(x) % 32)).repeat(2, 1)
    # Dequantised, a weight is its scale.
    ones = QuantizedWeight(torch.ones(x.numel(), 32, dtype=torch.int8), x.reshape(-1, 1), 8)
    kernels = emulated(dtype)
    prepared = kernels.prepare(ones, None)
    assert prepared is not None
    found = torch.empty(x.numel(), 32, dtype=dtype)
    kernels._dequantise(prepared, 0, x.numel(), found)
    wanted = x.reshape(-1).to(dtype)
    torch.testing.assert_close(found[:, 0], wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[:, 0].signbit() | wanted.isnan(), wanted.signbit() | wanted.isnan())
