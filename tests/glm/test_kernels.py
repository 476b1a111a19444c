"""Every native kernel that this machine can run against torch: exact layouts, stated tolerances, no surprises."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm.kernels import native
from glm.kernels.native import INSTRUCTION_SETS, NativeKernels, best_kernels, load_kernels
from glm.linear import DenseLinear, NativeLinear, QuantizedLinear, make_linear, pack
from glm.precision import Precision
from glm.quantization import QuantizedWeight, pack_int4, quantize

KERNELS = [kernels for name in INSTRUCTION_SETS if (kernels := load_kernels(name)) is not None]
FORMATS = ("int8", "int4", "int4 a scale per row", "bf16")
# Bounds on the error: of exact sums (torch in fp32 has the same), of 16-bit activations, of rounding to bf16.
EXACT, FAST, HALF = 2e-6, 2e-4, 1e-2

pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels were built here (no C++ compiler?)")


for_all_kernels = pytest.mark.parametrize("kernels", KERNELS, ids=lambda kernels: kernels.name)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, num_rows: int, num_columns: int) -> torch.Tensor | QuantizedWeight:
    weight = normal(num_rows, num_columns) / num_columns**0.5
    if kind == "bf16":
        return weight.to(torch.bfloat16)
    if kind != "int4 a scale per row":
        return quantize(weight, Precision(kind))
    integers = torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    return QuantizedWeight(pack_int4(integers), weight.abs().amax(1, keepdim=True).to(torch.float16) / 7, 4)


def dense(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    return (weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)).double()


def error(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """Rms of the error over that of sums of such products with random signs (chance may cancel one to nothing)."""
    wanted, squares = x.double() @ weight.t(), x.double().square() @ weight.square().t()
    if bias is not None:
        wanted, squares = wanted + bias.double(), squares + bias.double().square()
    return float((found.double() - wanted).norm() / squares.sum().sqrt())


def check_product(kernels: NativeKernels, kind: str, num_tokens: int, num_rows: int, num_columns: int) -> None:
    weight = make(kind, num_rows, num_columns)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    x, bias = normal(num_tokens, num_columns, seed=2).to(dtype), normal(num_rows, seed=3).to(dtype)
    for b in (None, bias):
        linear = make_linear(weight, b, kernels)
        assert isinstance(linear, NativeLinear)
        found = linear(x)
        assert (found.shape, found.dtype) == ((num_tokens, num_rows), dtype)
        assert error(found, x, dense(weight), b) < (HALF if kind == "bf16" else EXACT)
        if kind != "bf16":
            fast = kernels.product(x, linear.native, exact=False)
            assert error(fast, x, dense(weight), b) < FAST
            blocks = kernels.product_by_blocks(x, linear.native)
            assert error(blocks, x, dense(weight), b) < HALF


@for_all_kernels
@pytest.mark.parametrize("kind", FORMATS)
@given(tokens=st.integers(1, 19), rows=st.integers(1, 50), pairs=st.integers(1, 150))
def test_any_shape(kernels: NativeKernels, kind: str, tokens: int, rows: int, pairs: int) -> None:
    """The product with the dequantised weight, with and without bias, whatever does not divide into what."""
    columns = 32 * -(-pairs // 16) if kind == "int4" else 2 * pairs
    check_product(kernels, kind, tokens, rows, columns)


@for_all_kernels
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 4608, 4096), (5, 130, 13696), (16, 64, 4096)])
def test_real_widths(kernels: NativeKernels, kind: str, tokens: int, rows: int, columns: int) -> None:
    """Several chunks for several threads; long sums lose nothing."""
    check_product(kernels, kind, tokens, rows, columns)


@for_all_kernels
@pytest.mark.parametrize("kind", FORMATS)
def test_a_token_is_computed_as_if_alone(kernels: NativeKernels, kind: str) -> None:
    """Bit for bit, in any company and with any number of threads."""
    linear = make_linear(make(kind, 90, 416), None, kernels)
    x = normal(15, 416).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    alone = torch.cat([linear(row) for row in x.split(1)])
    assert torch.equal(linear(x), alone)
    torch.set_num_threads(3)
    try:
        assert torch.equal(linear(x), alone)
    finally:
        torch.set_num_threads(1)


@for_all_kernels
@pytest.mark.parametrize("kind", [k for k in FORMATS if k != "bf16"])
@given(rows=st.integers(1, 40), pairs=st.integers(1, 80))
def test_packing_is_exact(kernels: NativeKernels, kind: str, rows: int, pairs: int) -> None:
    """Rows come back as they went in, all of them or a few, in any order."""
    weight = make(kind, rows, 32 * -(-pairs // 16) if kind == "int4" else 2 * pairs)
    assert isinstance(weight, QuantizedWeight)
    packed = kernels.pack(weight)
    assert packed is not None
    assert (packed.num_rows, packed.num_columns, packed.bits) == (rows, weight.num_columns, weight.bits)
    for selection in (slice(None), torch.tensor([rows - 1, 0, 0])):
        found, wanted = packed.rows(selection), weight.rows(selection)
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.scales.float(), wanted.scales.float())


@for_all_kernels
def test_packing_costs_no_memory(kernels: NativeKernels) -> None:
    """At the widths of real models nothing is padded: integers and fp16 scales take what they took."""
    weight = make("int4", 64, 4096)
    assert isinstance(weight, QuantizedWeight)
    packed = kernels.pack(weight)
    assert packed is not None
    assert packed.num_bytes == weight.num_bytes


@for_all_kernels
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_extreme_activations(kernels: NativeKernels, size: float) -> None:
    """Zeros stay zero, tiny and huge values keep their digits."""
    weight = make("int8", 20, 64)
    x = normal(2, 64) * size
    found, wanted = make_linear(weight, None, kernels)(x), x.double() @ dense(weight).t()
    assert found.isfinite().all()
    assert (found.double() - wanted).norm() <= EXACT * wanted.norm()


@for_all_kernels
def test_an_outlier_does_not_drown_its_neighbours(kernels: NativeKernels) -> None:
    """One activation a thousand times as large as all others: they lose no more than the product as a whole."""
    weight, x = make("int8", 48, 256), normal(1, 256)
    x[0, 7] = 1000
    assert error(make_linear(weight, None, kernels)(x), x, dense(weight)) < EXACT


@for_all_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows(kernels: NativeKernels, bad: float) -> None:
    """A token with NaN or infinity gives no finite logits, the token beside it is not harmed."""
    linear, x = make_linear(make("int8", 20, 64), None, kernels), normal(2, 64)
    x[0, 3] = bad
    found = linear(x)
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@for_all_kernels
def test_unknown_kinds_stay_with_torch(kernels: NativeKernels) -> None:
    """fp32 and fp16 weights, and int4 in groups of another size."""
    for weight in (normal(8, 64), normal(8, 64).half()):
        assert isinstance(make_linear(weight, None, kernels), DenseLinear)
    odd = quantize(normal(8, 72), Precision.INT4)
    assert odd.scales.shape[1] == 9
    assert pack(odd, kernels) is odd
    assert isinstance(make_linear(odd, None, kernels), QuantizedLinear)


def test_without_kernels_torch_computes() -> None:
    """What a user has where nothing was built: the same classes as before."""
    assert isinstance(make_linear(make("int8", 8, 64), None, None), QuantizedLinear)
    assert isinstance(make_linear(make("bf16", 8, 64), None, None), DenseLinear)


@for_all_kernels
def test_no_tokens(kernels: NativeKernels) -> None:
    """An empty step has an empty result."""
    assert make_linear(make("int4", 8, 64), None, kernels)(torch.empty(0, 64)).shape == (0, 8)


@for_all_kernels
def test_callers_side_by_side(kernels: NativeKernels) -> None:
    """Two Python threads at once, each with several threads of its own: one gets the helpers, both are right."""
    linear, x = make_linear(make("int8", 2048, 512), None, kernels), normal(3, 512)
    wanted, wrong = linear(x), []

    def repeat() -> None:
        for _ in range(20):
            if not torch.equal(linear(x), wanted):
                wrong.append(1)

    torch.set_num_threads(3)
    try:
        callers = [threading.Thread(target=repeat) for _ in range(2)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(1)
    assert not wrong


def test_the_best_is_the_first_there_is() -> None:
    """The choice follows the order of `INSTRUCTION_SETS`."""
    assert best_kernels() is KERNELS[0]
    assert native.load_kernels("portable") is KERNELS[-1]
