"""From a wish to a plan: every fault at once, every split accepted, every part described."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import PlanError
from coordinator.plan import EndsPlan, Plan, StagePlan, describe, describe_stages, parse_device, wants_native_kernels
from coordinator.plan_request import Option, PlanRequest, StageRequest
from coordinator.planning import even_split, notes, plan_for, resolve

CPU = ("cpu",)
TWO_GPUS = ("cpu", "cuda:0", "cuda:1")
CPU_ENDS = EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32")


def ask(*stages: str, **options: str | int) -> PlanRequest:
    """A request in the words of the command line: `cuda:1=1-12`, `gpu_precision="int8"`."""
    wishes = tuple(StageRequest(f"--layers {s}", *s.split("=")) for s in stages)
    named = {k: Option(k, v) if isinstance(v, str) else v for k, v in options.items()}
    return replace(PlanRequest(stages=wishes), **named)


def faults_of(request: PlanRequest, num_layers: int = 28, devices: tuple[str, ...] = TWO_GPUS) -> str:
    with pytest.raises(PlanError) as caught:
        resolve(request, num_layers, devices)
    return "\n".join(caught.value.faults)


def test_the_predecessors_placement_becomes_three_stages_in_layer_order() -> None:
    """Stage order follows the layer numbers, not the order of the options."""
    request = ask("cpu=25-28", "cuda:0=13-24", "cuda:1=1-12", gpu_precision="int8", cpu_precision="fp32")
    plan = resolve(request, 28, TWO_GPUS)
    assert plan.stages == (
        StagePlan("cuda:1", 0, 12, "int8"),
        StagePlan("cuda:0", 12, 24, "int8"),
        StagePlan("cpu", 24, 28, "fp32"),
    )
    assert plan.ends == CPU_ENDS


def test_the_default_is_all_layers_on_one_cpu_stage_in_fp32() -> None:
    """Nothing asked, nothing surprising."""
    plan = plan_for(None, 6, CPU)
    assert plan == Plan((StagePlan("cpu", 0, 6, "fp32"),), CPU_ENDS)


@pytest.mark.parametrize("layers", ["cpu=5", "cpu=5-5", "cpu= 5 - 5 "])
def test_a_stage_of_one_layer_can_be_written_both_ways(layers: str) -> None:
    """`5` and `5-5` mean the same layer."""
    plan = resolve(ask("cpu=1-4", layers, "cpu=6"), 6, CPU)
    assert [(s.layer_start, s.layer_end) for s in plan.stages] == [(0, 4), (4, 5), (5, 6)]


def test_two_stages_may_share_a_device() -> None:
    """A device is a place, not a stage."""
    plan = resolve(ask("cuda=1-3", "cuda:0=4-6"), 6, TWO_GPUS)
    assert [s.device for s in plan.stages] == ["cuda:0", "cuda:0"]


def test_default_precisions_follow_the_device() -> None:
    """fp16 on a GPU, fp32 on a CPU; int8 layers leave the ends as they are."""
    plan = resolve(ask("cuda:0=1-3", "cpu=4-6", cpu_precision="int8", embeddings="cuda:0"), 6, TWO_GPUS)
    assert [s.precision for s in plan.stages] == ["fp16", "int8"]
    assert plan.ends == EndsPlan("cuda:0", "fp16", "cuda:0", "cuda:0", "fp16")


INT8_HEAD = {
    "int4 on a CPU": (ask(cpu_precision="int4"), "fp32", "int8"),
    "int8 on a GPU": (ask("cuda:0=1-6", gpu_precision="int8"), "fp32", "int8"),
    "both": (ask("cuda:0=1-3", "cpu=4-6", gpu_precision="int8", cpu_precision="int4"), "fp32", "int8"),
    "one float stage": (ask("cuda:0=1-3", "cpu=4-6", gpu_precision="int4"), "fp32", "fp32"),
    "a float wish for its device": (ask("cuda:0=1-6", gpu_precision="int4", cpu_precision="bf16"), "bf16", "bf16"),
    "a wish for the ends": (ask(cpu_precision="int4", ends_precision="bf16"), "bf16", "bf16"),
    "a wish for lm_head": (ask(cpu_precision="int4", lm_head_precision="int4"), "fp32", "int4"),
}


@pytest.mark.parametrize(("request_", "embedding", "lm_head"), INT8_HEAD.values(), ids=INT8_HEAD)
def test_lm_head_is_int8_where_all_stages_are_quantised(request_: PlanRequest, embedding: str, lm_head: str) -> None:
    """Unless told otherwise, by a wish for it or for its device; embeddings stay as they are."""
    ends = resolve(request_, 6, TWO_GPUS).ends
    assert (ends.embedding_precision, ends.lm_head_precision) == (embedding, lm_head)
    assert ends.final_layernorm_precision != "int8"


def test_a_published_quantised_checkpoint_keeps_its_float_lm_head() -> None:
    """Its publisher left lm_head alone; only a wish quantises it."""
    plan = plan_for(ask(cpu_precision="int4"), 6, CPU, is_quantized=True)
    assert plan.ends.lm_head_precision == "fp32"
    wished = ask(cpu_precision="int4", lm_head_precision="int8")
    assert plan_for(wished, 6, CPU, is_quantized=True).ends.lm_head_precision == "int8"


def test_the_ends_take_a_device_and_a_precision_of_their_own() -> None:
    """lm_head is beside the embeddings and final_layernorm beside lm_head, unless said otherwise."""
    beside = resolve(ask("cpu=1-6", embeddings="cuda:1"), 6, TWO_GPUS).ends
    assert (beside.embedding_device, beside.final_layernorm_device, beside.lm_head_device) == ("cuda:1",) * 3
    apart = ask("cpu=1-6", lm_head="cuda:0", final_layernorm="cpu", ends_precision="int8")
    ends = resolve(apart, 6, TWO_GPUS).ends
    assert ends == EndsPlan("cpu", "int8", "cpu", "cuda:0", "int8")
    assert ends.final_layernorm_precision == "fp32"


@pytest.mark.parametrize(
    ("request_", "is_wanted"),
    [
        (ask(), False),
        (ask(cpu_precision="bf16"), True),
        (ask("cuda:0=1-6"), False),
        (ask(lm_head_precision="int8"), True),
    ],
)
def test_native_kernels_are_for_narrow_weights_on_a_cpu(request_: PlanRequest, is_wanted: bool) -> None:
    """Of a stage or of lm_head; only then their absence is worth a word."""
    assert wants_native_kernels(resolve(request_, 6, TWO_GPUS)) == is_wanted


FAULTS = {
    "gap": (ask("cpu=1-12", "cpu=16-28"), "layers 13-15 are in no stage; all 28 layers must be placed, 25 are"),
    "wrong total": (ask("cpu=1-24"), "layers 25-28 are in no stage; all 28 layers must be placed, 24 are"),
    "missing first layer": (ask("cpu=2-28"), "layer 1 is in no stage"),
    "overlap": (ask("cpu=1-12", "cuda:0=10-28"), "layers 10-12 are in two stages, --layers cpu=1-12 and"),
    "nested": (ask("cpu=1-28", "cpu=5"), "layer 5 is in two stages"),
    "duplicate": (ask("cpu=1-28", "cpu=1-28"), "--layers cpu=1-28 is given twice"),
    "out of range": (ask("cpu=1-30"), "layer 30 is out of range; the model's layers are 1-28"),
    "layer zero": (ask("cpu=0-28"), "layer 0 is out of range"),
    "malformed": (ask("cpu=1_28"), "'1_28' is not a layer range; write 1-12, 5, 13- (to the last), or all"),
    "empty": (ask("cpu="), "'' is not a layer range"),
    "backwards": (ask("cpu=28-1"), "layers 28-1 run backwards; write 1-28"),
    "unknown device": (ask("gpu0=1-28"), "device 'gpu0' is unknown; choose one of cpu, cuda:0, cuda:1"),
    "nearly a device": (ask("cud:1=1-28"), "did you mean cuda:1?"),
    "absent device": (ask("cuda:3=1-28"), "cuda:3 is not on this machine, which has cpu, cuda:0, cuda:1"),
    "absent end device": (ask("cpu=1-28", lm_head="cuda:7"), "lm_head: device cuda:7 is not on this machine"),
    "unknown precision": (ask("cpu=1-28", cpu_precision="fp23"), "'fp23' is unknown; did you mean fp32?"),
    "fp8 on cpu": (ask("cpu=1-28", cpu_precision="fp8"), "'fp8' is unknown; did you mean int8?"),
    "fp8 on gpu": (ask("cuda:0=1-28", gpu_precision="fp8"), "'fp8' is unknown; did you mean int8?"),
    "float16 on cpu": (ask("cpu=1-28", cpu_precision="float16"), "did you mean bf16?"),
    "float16 on gpu": (ask("cuda:0=1-28", gpu_precision="float16"), "did you mean fp16?"),
    "nf4 ends": (ask("cpu=1-28", ends_precision="nf4"), "did you mean int4?"),
    "odd precision": (ask("cpu=1-28", gpu_precision="q9"), "choose one of fp32, bf16, fp16, int8, int4"),
    "fp16 on cpu": (ask("cpu=1-28", cpu_precision="fp16"), "fp16 does not compute on a CPU; use bf16"),
    "fp16 ends on cpu": (ask("cpu=1-28", ends_precision="fp16"), "ends_precision: fp16 does not compute"),
    "no stages": (ask(num_stages=0), "--stages 0: the model has 28 layers, so choose between 1 and 28"),
    "many stages": (ask(num_stages=29), "choose between 1 and 28"),
    "both ways": (ask("cpu=1-28", num_stages=2), "use it or --layers, not both"),
    "no threads": (ask("cpu=1-28", num_threads=0), "threads 0 is out of range; it must be from 1"),
}


@pytest.mark.parametrize(("request_", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_plan_is_refused_with_one_sentence(request_: PlanRequest, fault: str) -> None:
    """Each fault alone gives exactly one sentence, which names the culprit and the number."""
    text = faults_of(request_)
    assert fault in text
    assert text.count("\n") == 0


def test_all_faults_are_listed_at_once() -> None:
    """A user corrects a plan in one go."""
    request = ask("cpu=1-5", "cuda:9=4-10", "tpu=20-40", cpu_precision="fp16", ends_precision="half")
    text = faults_of(request)
    for part in ("layers 4-5 are in two", "cuda:9", "'tpu'", "layer 40", "layers 11-19", "fp16 does", "'half'"):
        assert part in text
    with pytest.raises(PlanError, match=r"the plan has 7 faults:\n  - "):
        resolve(request, 28, TWO_GPUS)


def test_a_malformed_range_is_not_reported_as_a_gap_as_well() -> None:
    """What fills the gap may be exactly what could not be read."""
    assert "in no stage" not in faults_of(ask("cpu=1-12", "cpu=13to28"))


def test_a_stage_beyond_the_model_fills_no_gap() -> None:
    """The layer that is not there and those that nobody holds are told together."""
    for beyond in ("cpu=30-40", "cpu=29", "cpu=0"):
        text = faults_of(ask("cpu=1-12", beyond))
        assert "is out of range" in text
        assert "layers 13-28 are in no stage; all 28 layers must be placed, 12 are" in text
        assert "two stages" not in text


def test_a_machine_without_gpus_says_so() -> None:
    """The remedy is the driver or the torch build, not another index."""
    assert "torch sees no GPU" in faults_of(ask("cuda:0=1-28"), devices=CPU)


def test_a_plan_built_by_hand_passes_the_same_checks() -> None:
    """`plan_for` gives a right plan back unchanged and refuses a wrong one."""
    plan = Plan((StagePlan("cpu", 0, 3, "int8", 2, 64), StagePlan("cuda:1", 3, 6, "bf16")), CPU_ENDS)
    assert plan_for(plan, 6, TWO_GPUS) == plan
    with pytest.raises(PlanError, match="stage 2: device cuda:1"):
        plan_for(plan, 6, CPU)
    with pytest.raises(PlanError, match="at least one stage"):
        plan_for(Plan((), CPU_ENDS), 6, CPU)


def test_options_that_touch_nothing_are_noted() -> None:
    """An option is never ignored in silence."""
    request = ask("cpu=1-6", gpu_precision="int8", cpu_precision="fp32")
    assert notes(request, resolve(request, 6, CPU)) == (
        "gpu_precision int8 touches nothing: no part of the model is on a GPU",
    )
    request = ask("cuda:0=1-6", embeddings="cuda:0", cpu_precision="int8")
    assert "on a CPU" in notes(request, resolve(request, 6, TWO_GPUS))[0]


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", "cpu"), ("CUDA", "cuda:0"), (" cuda:11 ", "cuda:11"), ("cuda:", None), ("cuda:-1", None)],
)
def test_devices_have_one_spelling(text: str, device: str | None) -> None:
    """`cuda` is the first GPU; anything unclear is no device."""
    assert parse_device(text) == device


@given(st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_an_even_split_covers_every_layer_once(sizes: tuple[int, int]) -> None:
    """Any number of stages up to one a layer: consecutive ranges whose sizes differ by at most one."""
    num_layers, num_stages = sizes
    ranges = even_split(num_layers, num_stages)
    assert [layer for start, end in ranges for layer in range(start, end)] == list(range(num_layers))
    lengths = [end - start for start, end in ranges]
    assert max(lengths) - min(lengths) <= 1
    plan = resolve(ask(num_stages=num_stages), num_layers, CPU)
    assert [(s.layer_start, s.layer_end) for s in plan.stages] == list(ranges)


@given(st.integers(1, 40), st.data())
def test_every_split_in_any_order_is_accepted(num_layers: int, data: st.DataObject) -> None:
    """Cut anywhere, list the pieces in any order: the stages come out contiguous and in order."""
    cuts = sorted(data.draw(st.sets(st.integers(1, num_layers - 1)) if num_layers > 1 else st.just(set())))
    bounds = [0, *cuts, num_layers]
    pieces = [f"cpu={start + 1}-{end}" for start, end in itertools.pairwise(bounds)]
    plan = resolve(ask(*data.draw(st.permutations(pieces))), num_layers, CPU)
    assert [(s.layer_start, s.layer_end) for s in plan.stages] == list(itertools.pairwise(bounds))


@given(st.lists(st.tuples(st.integers(-2, 14), st.integers(-2, 14)), min_size=1, max_size=5))
def test_a_plan_is_accepted_exactly_when_it_covers_every_layer_once(ranges: list[tuple[int, int]]) -> None:
    """No wrong set of ranges passes, no right one is refused."""
    request = ask(*(f"cpu={first}-{last}" for first, last in ranges))
    covered = sorted(layer for first, last in ranges for layer in range(first, last + 1))
    is_right = covered == list(range(1, 13)) and all(first <= last for first, last in ranges)
    try:
        plan = resolve(request, 12, CPU)
    except PlanError:
        assert not is_right
    else:
        assert is_right
        assert plan.num_layers == 12


def test_a_long_model_is_described_in_groups_and_line_by_line_when_verbose() -> None:
    """`layers 1-12 -> int8 -> cuda:1`; with -v each layer; a single-layer stage is a `layer` either way."""
    plan = resolve(ask("cuda:1=1-12", "cpu=13", "cpu=14-28", gpu_precision="int8"), 28, TWO_GPUS)
    assert describe(plan) == (
        "embeddings -> fp32 -> cpu",
        "layers 1-12 -> int8 -> cuda:1",
        "layer 13 -> fp32 -> cpu",
        "layers 14-28 -> fp32 -> cpu",
        "final_layernorm -> fp32 -> cpu",
        "lm_head -> fp32 -> cpu",
    )
    verbose = describe(plan, verbose=True)
    assert len(verbose) == 31
    assert verbose[12] == "layer 12 -> int8 -> cuda:1"


def test_a_small_model_is_described_layer_by_layer() -> None:
    """Few enough lines to read them all."""
    lines = describe(resolve(ask("cpu=1-3", "cpu=4-6", cpu_precision="bf16"), 6, CPU))
    assert lines[1] == "layer 1 -> bf16 -> cpu"
    assert len(lines) == 9


def test_stages_are_described_by_their_numbers() -> None:
    """As the reports name them, from 1, however few layers there are; two on one device can be told apart."""
    lines = describe_stages(resolve(ask("cpu=1-3", "cpu=4", "cuda:0=5-6"), 6, TWO_GPUS))
    assert lines == (
        "embeddings -> fp32 -> cpu",
        "stage 1, layers 1-3 -> fp32 -> cpu",
        "stage 2, layer 4 -> fp32 -> cpu",
        "stage 3, layers 5-6 -> fp16 -> cuda:0",
        "final_layernorm -> fp32 -> cpu",
        "lm_head -> fp32 -> cpu",
    )
