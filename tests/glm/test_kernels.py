"""Every native kernel that this machine can run against torch: exact layouts, stated tolerances, no surprises.

No deadlines: the machine may be busy.
"""

import sys
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from glm.kernels import native
from glm.kernels.memory import empty_weight
from glm.kernels.native import INSTRUCTION_SETS, CacheView, NativeKernels, best_kernels, load_kernels
from glm.linear import DenseLinear, NativeLinear, QuantizedLinear, make_linear, pack
from glm.norm import RMSNorm
from glm.precision import Precision
from glm.quantization import QuantizedWeight, pack_int4, quantize
from glm.rotary import RotaryTable, rotate_neighbours
from tests.native_kernels import for_all_kernels

KERNELS = [kernels for name in INSTRUCTION_SETS if (kernels := load_kernels(name)) is not None]
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = ("int8", "int4", "int4 a scale per row", *FLOATS)
INTEGERS = FORMATS[:3]
# Bounds on the rms error over that of sums with random signs, from the arithmetic. Sums of n products in fp32, in 4
# parts at least: sqrt(n / 12) roundings of 2^-24 each, 2e-6 at n = 13696. Activations of 16 bits have steps of 2^-15 of
# the largest of 32 (which is some three times their rms), of 8 bits 2^-7; results in fp16 and bf16 are rounded by up to
# 2^-11 and 2^-8.
EXACT, FAST, COARSE = 2e-6, 2e-4, 1e-2
BOUNDS = {"int8": FAST, "int4": COARSE, "int4 a scale per row": COARSE, "fp32": EXACT, "fp16": 2**-11, "bf16": 2**-8}
# Of numbers of size 1 and more that are rounded twice.
NEARLY_EQUAL = {
    torch.float32: {"atol": 1e-6, "rtol": 1e-5},
    torch.float16: {"atol": 2e-3, "rtol": 2e-3},
    torch.bfloat16: {"atol": 1e-2, "rtol": 1.6e-2},
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, num_rows: int, num_columns: int) -> torch.Tensor | QuantizedWeight:
    weight = normal(num_rows, num_columns) / num_columns**0.5
    if kind in FLOATS:
        return weight.to(FLOATS[kind])
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


def check_product(
    kernels: NativeKernels, kind: str, num_tokens: int, num_rows: int, num_columns: int, leeway: float = 1
) -> None:
    weight = make(kind, num_rows, num_columns)
    dtype = FLOATS.get(kind, torch.float32)
    x, bias = normal(num_tokens, num_columns, seed=2).to(dtype), normal(num_rows, seed=3).to(dtype)
    for b in (None, bias):
        linear = make_linear(weight, b, kernels)
        assert isinstance(linear, NativeLinear)
        found = linear(x)
        assert (found.shape, found.dtype) == ((num_tokens, num_rows), dtype)
        assert error(found, x, dense(weight), b) < leeway * BOUNDS[kind]
        if isinstance(weight, QuantizedWeight):
            exact = make_linear(replace(weight, is_exact=True), b, kernels)(x)
            assert error(exact, x, dense(weight), b) < EXACT


@for_all_kernels
@pytest.mark.parametrize("kind", FORMATS)
@settings(deadline=None)
@given(tokens=st.integers(1, 19), rows=st.integers(1, 50), pairs=st.integers(1, 150))
def test_any_shape(kernels: NativeKernels, kind: str, tokens: int, rows: int, pairs: int) -> None:
    """The product with the dequantised weight, with and without bias, whatever does not divide into what."""
    columns = 32 * -(-pairs // 16) if kind == "int4" else 2 * pairs
    # A few sums of a few products may cancel almost wholly, and errors of activations do not cancel with them.
    check_product(kernels, kind, tokens, rows, columns, leeway=5)


@for_all_kernels
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(1, 4608, 4096), (5, 130, 13696), (16, 64, 4096), (70, 96, 4096)]
)
def test_real_widths(kernels: NativeKernels, kind: str, tokens: int, rows: int, columns: int) -> None:
    """Several chunks for several threads; long sums lose nothing."""
    check_product(kernels, kind, tokens, rows, columns)


# Sizes of steps, on both sides of all tiles and chunks, of which there are several in the widest.
CUTS = [[300], [1] * 12 + [288], [7] * 42 + [6], [8, 9, 63, 64, 65, 70, 21], [256, 44], [1, 299]]


@for_all_kernels
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("is_exact", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(90, 416), (38, 4192)])
def test_a_token_is_computed_as_if_alone(
    kernels: NativeKernels, kind: str, is_exact: bool, rows: int, columns: int
) -> None:
    """Bit for bit, however many come together, wherever it stands among them, and with any number of threads."""
    weight = make(kind, rows, columns)
    if isinstance(weight, QuantizedWeight):
        weight = replace(weight, is_exact=is_exact)
    linear = make_linear(weight, None, kernels)
    x = normal(300, columns).to(FLOATS.get(kind, torch.float32))
    alone = torch.cat([linear(row) for row in x.split(1)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            for cut in CUTS:
                assert torch.equal(torch.cat([linear(part) for part in x.split(cut)]), alone)
        finally:
            torch.set_num_threads(1)


@for_all_kernels
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("num_tokens", [1, 8, 9, 64, 65, 70, 256])
def test_an_exact_weight_is_exact(kernels: NativeKernels, kind: str, num_tokens: int) -> None:
    """A published quantised model is computed as exactly as in fp32, by every instruction set, in a prompt of any
    length: no kernel and no matrix unit rounds it to 16 bits beyond some number of tokens."""
    weight = make(kind, 96, 4096)
    assert isinstance(weight, QuantizedWeight)
    weight, x = replace(weight, is_exact=True), normal(num_tokens, 4096, seed=2)
    assert error(make_linear(weight, None, kernels)(x), x, dense(weight)) < EXACT


@for_all_kernels
@pytest.mark.parametrize("kind", INTEGERS)
@settings(deadline=None)
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
    assert (found.double() - wanted).norm() <= FAST * wanted.norm()


@for_all_kernels
def test_an_outlier_does_not_drown_its_neighbours(kernels: NativeKernels) -> None:
    """One activation a thousand times as large as all others: they lose no more than the product as a whole."""
    weight, x = make("int8", 48, 256), normal(1, 256)
    assert isinstance(weight, QuantizedWeight)
    x[0, 7] = 1000
    for is_exact, bound in ((True, EXACT), (False, FAST)):
        assert error(make_linear(replace(weight, is_exact=is_exact), None, kernels)(x), x, dense(weight)) < bound


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_finite_number_of_16_bits_comes_back(kernels: NativeKernels, dtype: torch.dtype) -> None:
    """Multiplied by one and added to zeros: normal, subnormal, of both signs. (Subnormal bf16 may count as zero.)"""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    is_kept = numbers.isfinite() & ((numbers.abs() >= torch.finfo(dtype).tiny) | torch.tensor(dtype == torch.float16))
    numbers = torch.where(is_kept, numbers, 0).view(-1, 32)
    found = make_linear(torch.eye(32).to(dtype), None, kernels)(numbers)
    assert torch.equal(found, numbers)


@for_all_kernels
def test_unknown_kinds_are_dequantised_first(kernels: NativeKernels) -> None:
    """int4 in groups of another size, and a dtype that no layer has; what is dequantised is multiplied natively, each
    token as if it were alone."""
    assert isinstance(make_linear(normal(8, 64).double(), None, kernels), DenseLinear)
    odd = quantize(normal(8, 72), Precision.INT4)
    assert odd.scales.shape[1] == 9
    assert pack(odd, kernels) is odd
    linear, x = make_linear(odd, None, kernels), normal(70, 72, seed=1)
    assert isinstance(linear, QuantizedLinear)
    assert kernels.name in linear.path
    assert error(linear(x), x, dense(odd)) < EXACT
    assert torch.equal(linear(x), torch.cat([linear(row) for row in x.split(1)]))


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


@for_all_kernels
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@settings(deadline=None)
@given(tokens=st.integers(1, 6), pairs=st.integers(1, 60))
def test_norm_and_gate(kernels: NativeKernels, dtype: torch.dtype, tokens: int, pairs: int) -> None:
    """The same as torch's many passes, to the last digits of the dtype, large and NaN values too."""
    x, weight = normal(tokens, 2 * pairs).to(dtype), normal(2 * pairs, seed=1).to(dtype)
    x[0, 0], x[0, -1] = 300, -300
    bound = NEARLY_EQUAL[dtype]
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), RMSNorm(weight, 1e-5)(x), **bound)
    first, second = x.chunk(2, dim=1)
    torch.testing.assert_close(kernels.gate(x), functional.silu(first) * second, **bound)
    x[0, 0] = torch.nan
    assert kernels.gate(x)[0, 0].isnan()
    assert kernels.rms_norm(x, weight, 1e-5)[0].isnan().all()


@for_all_kernels
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@settings(deadline=None)
@given(tokens=st.integers(1, 6), heads=st.integers(1, 5), pairs=st.integers(1, 20), rest=st.integers(0, 8))
def test_rotation(kernels: NativeKernels, dtype: torch.dtype, tokens: int, heads: int, pairs: int, rest: int) -> None:
    """Neighbours turn as torch turns them, in the first heads only; what is not rotated is not touched."""
    x = normal(tokens, heads + 2, 2 * pairs + rest).to(dtype)
    angles = normal(tokens, 1, 1, pairs, seed=1)
    table = RotaryTable(angles.cos(), angles.sin())
    wanted = torch.cat((rotate_neighbours(x[:, :heads], table), x[:, heads:]), dim=1)
    kernels.rotate(x, heads, table.cos, table.sin)
    bound = NEARLY_EQUAL[dtype]
    torch.testing.assert_close(x, wanted, **bound)


@for_all_kernels
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=str)
@settings(deadline=None)
@given(
    groups=st.integers(1, 3),
    shared=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.sampled_from([2, 8, 24, 128]),
    length=st.integers(0, 70),
    num_tokens=st.sampled_from([1, 1, 2, 3, 5, 16, 40]),
    is_prefix=st.booleans(),
)
def test_attention(
    kernels: NativeKernels,
    dtype: torch.dtype,
    groups: int,
    shared: int,
    head_dim: int,
    length: int,
    num_tokens: int,
    is_prefix: bool,
) -> None:
    """The same as torch's over the cache with the new keys and values behind it, as far as each token may look; beyond,
    the cache is not touched. Bit for bit the same if the tokens come one by one, a prefix that sees itself at once."""
    end = length + num_tokens
    num_visible = length + num_tokens // 2 if is_prefix else 0
    cached = [normal(groups, end + 2, head_dim, seed=seed).to(dtype) for seed in (1, 2)]
    new = normal(num_tokens, groups * shared + 2 * groups, head_dim).to(dtype)
    query, key, value = new.split([groups * shared, groups, groups], dim=1)
    wanted_cache = [tensor.clone() for tensor in cached]
    for tensor, part in zip(wanted_cache, (key, value), strict=True):
        tensor[:, length:end] = part.transpose(0, 1)
    keys, values = (t[:, :end].repeat_interleave(shared, 0).float() for t in wanted_cache)
    visible = torch.arange(end) <= torch.arange(length, end).clamp(min=num_visible - 1).unsqueeze(1)
    queries = query.float().transpose(0, 1)
    wanted = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=visible).transpose(0, 1)
    one_by_one = [tensor.clone() for tensor in cached]
    out, each_out = torch.empty(query.shape, dtype=dtype), torch.empty(query.shape, dtype=dtype)
    kernels.attend(query, key, value, [CacheView(cached[0], cached[1], length, num_tokens, num_visible)], out)
    assert all(torch.equal(a, b) for a, b in zip(cached, wanted_cache, strict=True))
    bound = NEARLY_EQUAL[dtype] if dtype != torch.float32 else {"atol": 2e-6, "rtol": 1e-4}
    torch.testing.assert_close(out, wanted.to(dtype), **bound)
    start = num_tokens // 2 if is_prefix else 0
    for place in [slice(0, start)] * (start > 0) + [slice(i, i + 1) for i in range(start, num_tokens)]:
        view = CacheView(*one_by_one, length + place.start, place.stop - place.start, num_visible)
        kernels.attend(*[part[place] for part in (query, key, value)], [view], each_out[place])
    assert torch.equal(out, each_out)


@pytest.mark.parametrize("shape", [(3, 5), (1 << 10, 1 << 10), (1031, 4099)])
def test_memory_for_weights(shape: tuple[int, int]) -> None:
    """A tensor like any other, whatever its size; a large one starts on a 2 MiB boundary."""
    tensor = empty_weight(shape, torch.bfloat16).fill_(1)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, torch.bfloat16, True)
    assert float(tensor.sum(dtype=torch.float64)) == shape[0] * shape[1]
    if sys.platform == "linux" and tensor.numel() * 2 >= 2 << 20:
        assert tensor.data_ptr() % (2 << 20) == 0
