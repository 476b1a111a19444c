"""Rung 6: packing is exact, quantisation errs within stated bounds, at every level from a weight to the logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.config import load_config, parse_config
from glm.ends import Embedding, Head, end_placement
from glm.errors import PrecisionError
from glm.kernels.native import best_kernels
from glm.linear import DenseLinear, QuantizedLinear, make_linear, make_weight
from glm.model import Model
from glm.positions import prompt_layout
from glm.precision import Precision, compute_dtype
from glm.quantization import INT4_GROUP_SIZE, QuantizedWeight, group_size, pack_int4, quantize, unpack_int4
from tests.tiny_checkpoints import FAMILIES, NATIVE, publish_quantized, write_checkpoint

CPU = torch.device("cpu")
INTEGERS = (Precision.INT8, Precision.INT4)


def relative_rms(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def normal(num_rows: int, num_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)) / num_columns**0.5


def with_outliers(num_rows: int, num_columns: int) -> torch.Tensor:
    """Every 128th column ten times as large: what trained layers do at their worst."""
    weight = normal(num_rows, num_columns)
    weight[:, ::128] *= 10
    return weight


@given(st.data())
def test_packing_is_exact(data: st.DataObject) -> None:
    """unpack(pack(v)) is v for all values, and pack(unpack(p)) is p for all bytes."""
    num_rows, num_pairs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    size = num_rows * num_pairs
    values = data.draw(st.lists(st.integers(-8, 7), min_size=2 * size, max_size=2 * size))
    unpacked = torch.tensor(values, dtype=torch.int8).view(num_rows, 2 * num_pairs)
    assert torch.equal(unpack_int4(pack_int4(unpacked)), unpacked)
    packed = torch.tensor(list(data.draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    packed = packed.view(torch.int8).view(num_rows, num_pairs)
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_packing_is_the_published_one() -> None:
    """Byte j holds column 2j in the high nibble and 2j+1 in the low one, two's complement: all 256 pairs."""
    high, low = (grid.flatten() for grid in torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij"))
    values = torch.stack((high, low), dim=-1).to(torch.int8).view(256, 2)
    wanted = [16 * (h % 16) + low_one % 16 for h, low_one in zip(high.tolist(), low.tolist(), strict=True)]
    assert pack_int4(values).view(torch.uint8).flatten().tolist() == wanted


@pytest.mark.parametrize("bits", [8, 4])
def test_published_weights_dequantise_to_integer_times_scale(bits: int) -> None:
    """The result is exact in fp32, and as far from the original as half a step."""
    weight = normal(24, 40)
    values, scales = publish_quantized(weight, bits)
    stored = QuantizedWeight(values, scales.view(-1, 1), bits)
    assert (stored.num_rows, stored.num_columns) == (24, 40)
    restored, step = stored.dequantize(torch.float32), scales.float().unsqueeze(1)
    assert torch.equal(restored / step, (restored / step).round())
    assert ((restored - weight).abs() <= step * 0.51).all()


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_int8_errs_by_half_a_step_at_most(num_rows: int, num_columns: int, seed: int, size: float) -> None:
    """Any shape, any magnitude: a step is the row's largest magnitude over 127."""
    weight = normal(num_rows, num_columns, seed) * size
    restored = quantize(weight, Precision.INT8).dequantize(torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored - weight).abs() <= step * 0.5001).all()


@given(st.integers(1, 6), st.integers(1, 60), st.integers(0, 2**31))
def test_int4_errs_by_a_step_and_a_half_at_most(num_rows: int, num_pairs: int, seed: int) -> None:
    """Any even number of columns: a value is off by half a step, or clipped by 1.5 steps of an 8.5th at the most."""
    weight = normal(num_rows, 2 * num_pairs, seed)
    restored = quantize(weight, Precision.INT4).dequantize(torch.float32)
    group = group_size(4, 2 * num_pairs)
    error, grouped = (t.view(num_rows, -1, group) for t in ((restored - weight).abs(), weight))
    assert (error <= grouped.abs().amax(-1, keepdim=True) * 1.51 / 8.5).all()


@pytest.mark.parametrize(
    ("precision", "make", "bound"),
    [
        (Precision.INT8, normal, 0.010),
        (Precision.INT8, with_outliers, 0.045),
        (Precision.INT4, normal, 0.085),
        (Precision.INT4, with_outliers, 0.145),
    ],
)
def test_relative_error_of_a_weight(
    precision: Precision, make: Callable[[int, int], torch.Tensor], bound: float
) -> None:
    """|W' - W| / |W| at a real width: int8 1%, int4 8.5%; with outliers 4.5% and 14.5% (docs/measurements.md)."""
    weight = make(64, 4096)
    assert relative_rms(quantize(weight, precision).dequantize(torch.float32), weight) < bound


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_stored_dtype_does_not_matter(precision: Precision, dtype: torch.dtype) -> None:
    """A float checkpoint in any dtype quantises to what its fp32 copy does."""
    weight = normal(8, 64).to(dtype)
    low, high = quantize(weight, precision), quantize(weight.float(), precision)
    assert torch.equal(low.values, high.values)
    assert torch.equal(low.scales, high.scales)


@pytest.mark.parametrize("precision", INTEGERS)
def test_zeros_stay_zero(precision: Precision) -> None:
    """A row or group of zeros has scale 0 and no NaN anywhere."""
    weight = normal(4, 64)
    weight[1], weight[2, :32] = 0, 0
    restored = quantize(weight, precision).dequantize(torch.float32)
    assert not restored[1].any()
    assert not restored[2, :32].any()
    assert restored.isfinite().all()


def test_blocks_of_rows_do_not_show() -> None:
    """A matrix of several blocks quantises and multiplies as its rows do one by one."""
    weight, x = normal(600, 4096), normal(3, 4096)
    for precision in INTEGERS:
        whole = quantize(weight, precision)
        assert len(whole.row_blocks()) > 1
        for row in (0, 255, 256, 599):
            alone = quantize(weight[row : row + 1], precision)
            assert torch.equal(whole.values[row], alone.values[0])
        product = QuantizedLinear(whole, None)(x)
        # Of sums of 4096 products in fp32, whatever the order: the rms of 64 roundings of 2^-24 and less.
        assert relative_rms(product.double(), x.double() @ whole.dequantize(torch.float32).double().t()) < 4e-6


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_weight_that_is_not_finite_shows(precision: Precision, bad: float) -> None:
    """At every precision: the results of its row are not finite, all others are; no precision takes it for a zero."""
    weight = normal(6, 64).double()
    weight[2, 40] = bad
    weight = weight.to(torch.float32)
    cpu = torch.device("cpu")
    dtype = compute_dtype(precision, cpu, parse_config(NATIVE))
    for kernels in (None, best_kernels()):
        found = make_linear(make_weight(weight, precision, dtype, cpu), None, kernels)(normal(9, 64, seed=1).to(dtype))
        is_finite = found.isfinite()
        assert not is_finite[:, 2].any()
        assert is_finite[:, [0, 1, 3, 4, 5]].all()


def test_group_sizes() -> None:
    """int8 one per row; int4 32, or the largest power of two that divides the columns; odd columns are refused."""
    assert group_size(8, 4096) == 4096
    assert [group_size(4, n) for n in (4096, 13696, 72, 216, 6)] == [INT4_GROUP_SIZE, 32, 8, 8, 2]
    with pytest.raises(PrecisionError, match="int4 needs an even number of input features, not 33; use int8"):
        quantize(normal(4, 33), Precision.INT4)


@pytest.mark.parametrize("precision", INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_linear_equals_the_dense_one(precision: Precision, dtype: torch.dtype) -> None:
    """The product is that of the dequantised weight, with and without bias, for one token and for many."""
    weight, bias = quantize(normal(48, 64), precision), normal(1, 48)[0].to(dtype)
    dense = weight.dequantize(dtype)
    for num_tokens in (0, 1, 7):
        x = normal(num_tokens, 64, seed=1).to(dtype)
        for b in (None, bias):
            found = QuantizedLinear(weight, b)(x)
            assert found.dtype == dtype
            bound = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found, DenseLinear(dense, b)(x), atol=bound, rtol=bound)


def test_sizes_are_counted() -> None:
    """Bytes of values, scales and bias."""
    assert quantize(normal(8, 64), Precision.INT8).num_bytes == 8 * 64 + 8 * 4
    assert quantize(normal(8, 64), Precision.INT4).num_bytes == 8 * 32 + 8 * 2 * 2
    linear = make_linear(make_weight(normal(8, 64), Precision.BF16, torch.bfloat16, CPU), torch.zeros(8), None)
    assert linear.num_bytes == 2 * 8 * 64 + 4 * 8


def published(weight: torch.Tensor, bits: int) -> QuantizedWeight:
    values, scales = publish_quantized(weight, bits)
    return QuantizedWeight(values, scales.view(-1, 1), bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_published_weights_at_their_own_precision_are_kept(bits: int) -> None:
    """Values and scales as stored, in memory of their own."""
    stored = published(normal(16, 64), bits)
    kept = make_weight(stored, Precision(f"int{bits}"), torch.float32, CPU)
    assert isinstance(kept, QuantizedWeight)
    assert torch.equal(kept.values, stored.values)
    assert torch.equal(kept.scales, stored.scales)
    assert kept.values.data_ptr() != stored.values.data_ptr()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
def test_published_weights_become_dense(bits: int, precision: Precision) -> None:
    """At a float precision they are dequantised, rounded once."""
    stored = published(normal(600, 4096), bits)
    dtype = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[precision]
    dense = make_weight(stored, precision, dtype, CPU)
    assert isinstance(dense, torch.Tensor)
    assert torch.equal(dense, stored.dequantize(torch.float32).to(dtype))


def test_published_int4_is_exact_at_int8() -> None:
    """The same integers with the same scales, unpacked."""
    stored = published(normal(600, 4096), 4)
    wider = make_weight(stored, Precision.INT8, torch.float32, CPU)
    assert isinstance(wider, QuantizedWeight)
    assert wider.bits == 8
    assert torch.equal(wider.dequantize(torch.float32), stored.dequantize(torch.float32))


def test_published_int8_at_int4_is_quantised_again() -> None:
    """It loses what int4 loses, in groups of its own."""
    stored = published(normal(600, 4096), 8)
    narrower = make_weight(stored, Precision.INT4, torch.float32, CPU)
    assert isinstance(narrower, QuantizedWeight)
    assert narrower.scales.shape == (600, 4096 // INT4_GROUP_SIZE)
    assert relative_rms(narrower.dequantize(torch.float32), stored.dequantize(torch.float32)) < 0.09


@pytest.mark.parametrize("text", ["int3", "INT8", "", "float16", "fp8"])
def test_unknown_precisions_list_the_known(text: str) -> None:
    """The five names, as users write them."""
    with pytest.raises(
        PrecisionError, match=f"precision '{text}' is unknown; choose one of fp32, bf16, fp16, int8, int4"
    ):
        Precision.parse(text)
    assert [Precision.parse(p.value) for p in Precision] == list(Precision)


# Relative rms of the logits against fp32 on the tiny models below, whose random weights carry errors on undamped.
LOGITS_BOUND = {Precision.FP16: 0.005, Precision.BF16: 0.03, Precision.INT8: 0.05, Precision.INT4: 0.6}
PROMPTS = {"chatglm": [5, 6, 30, 91, 94], "chatglm2": [5, 6, 7, 30], "glm": [5, 6, 7, 30], "glm4": [5, 6, 7, 30]}


def logits_of(model: Model, ids: list[int]) -> torch.Tensor:
    segment = Segment(model.layers.new_cache(), 0, len(ids), prompt_layout(ids, model.config))
    return model.head.forward(model.layers.forward(model.embedding.forward(torch.tensor(ids)), [segment]))


@pytest.fixture(scope="module", params=FAMILIES)
def family_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp(request.param) / request.param
    widths = {"hidden_size": 128, "ffn_hidden_size": 256, "inner_hidden_size": 256, "intermediate_size": 256}
    keys = FAMILIES[request.param]
    write_checkpoint(model_dir, keys | {key: value for key, value in widths.items() if key in keys})
    return model_dir


@pytest.mark.parametrize("precision", LOGITS_BOUND)
def test_logits_at_every_precision(family_dir: Path, precision: Precision) -> None:
    """A whole model, both ends included, at one precision against itself in fp32."""
    config, checkpoint = load_config(family_dir), Checkpoint(family_dir)
    ids = PROMPTS[config.family]
    wanted = logits_of(Model.load(checkpoint, config), ids)
    model = Model.load(checkpoint, config, precision)
    assert model.layers.placement.dtype == compute_dtype(precision, CPU, config)
    assert relative_rms(logits_of(model, ids), wanted) < LOGITS_BOUND[precision]


@pytest.mark.parametrize("precision", Precision)
def test_embedding_rows(family_dir: Path, precision: Precision) -> None:
    """Looking up rows of a table at any precision is rounding the rows looked up in fp32."""
    config, checkpoint = load_config(family_dir), Checkpoint(family_dir)
    ids = torch.tensor([0, 95, 7, 7])
    wanted = Embedding.load(checkpoint, config, end_placement(Precision.FP32, CPU, config)).forward(ids)
    table = Embedding.load(checkpoint, config, end_placement(precision, CPU, config))
    found = table.forward(ids)
    assert found.shape == (4, config.hidden_size)
    assert found.dtype == compute_dtype(precision, CPU, config)
    assert torch.equal(found[2], found[3])
    bound = {"fp32": 0, "bf16": 0.004, "fp16": 0.0005, "int8": 0.01, "int4": 0.09}[precision]
    assert relative_rms(found, wanted) <= bound


def test_parts_of_the_head_have_precisions_of_their_own(family_dir: Path) -> None:
    """An fp32 final norm before an int8 lm_head: the normed states are those of fp32."""
    config, checkpoint = load_config(family_dir), Checkpoint(family_dir)
    exact, coarse = (end_placement(p, CPU, config) for p in (Precision.FP32, Precision.INT8))
    mixed, wanted = Head.load(checkpoint, config, exact, coarse), Head.load(checkpoint, config, exact, exact)
    hidden = normal(3, config.hidden_size)
    assert torch.equal(mixed.final_norm(hidden), wanted.final_norm(hidden))
    assert mixed.num_bytes < wanted.num_bytes / 3
    assert 0 < relative_rms(mixed.forward(hidden), wanted.forward(hidden)) < 0.015
