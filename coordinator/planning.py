"""From a wish to a plan: pure checks that find every fault before anything is loaded."""

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from coordinator.errors import PlanError
from coordinator.limits import (
    MAX_THREADS,
    ModelLimits,
    budget_faults,
    kv_budget_in_tokens,
    out_of_range,
    traffic_faults,
)
from coordinator.plan import (
    CPU_PRECISIONS,
    MAX_NUM_SEQS,
    PRECISIONS,
    PREFILL_CHUNK,
    QUANTIZED,
    EndsPlan,
    Plan,
    StagePlan,
    available_devices,
    default_precision,
    is_gpu,
    layers_text,
    parse_device,
)
from coordinator.plan_file import read_plan_file
from coordinator.plan_request import Option, PlanRequest, StageRequest, request_of

HEAD_PRECISION = "int8"
"""lm_head's where all stages are quantised: docs/measurements.md has why not int4."""
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

PlanSource = Plan | PlanRequest | Path | str | None
"""A plan, a wish, a plan file, or None for the default."""


class _Range(NamedTuple):
    """A well-formed layer range `[start, end)` and the origin it came from."""

    start: int
    end: int
    origin: str


def plan_for(
    source: PlanSource,
    num_layers: int,
    devices: Sequence[str] | None = None,
    *,
    is_quantized: bool = False,
    precision: str | None = None,
    lm_head_precision: str | None = None,
    limits: ModelLimits | None = None,
) -> Plan:
    """The checked plan for a model of `num_layers`, whatever form the wish has.

    `devices` defaults to those of this machine; `is_quantized` says that the checkpoint was published with integer
    weights, `precision` and `lm_head_precision` what it was converted to. Raises PlanError with every fault.
    """
    if source is None:
        request = PlanRequest()
    elif isinstance(source, Plan):
        request = request_of(source)
    elif isinstance(source, PlanRequest):
        request = source
    else:
        request = read_plan_file(Path(source))
    request = replace(request, default_precision=precision, default_head_precision=lm_head_precision)
    devices = available_devices() if devices is None else devices
    return resolve(request, num_layers, devices, is_quantized=is_quantized, limits=limits)


def resolve(
    request: PlanRequest,
    num_layers: int,
    devices: Sequence[str],
    *,
    is_quantized: bool = False,
    limits: ModelLimits | None = None,
) -> Plan:
    """The plan that a request means for a model of `num_layers` on a machine with `devices`.

    Pure. Raises PlanError with all faults, in the order a user wrote things.
    """
    faults = list(request.faults)
    _check_precisions(request, faults)
    stages = _stages(request, num_layers, devices, faults, limits)
    ends = _ends(request, stages, devices, faults, is_quantized)
    faults += traffic_faults(request, limits)
    if faults:
        raise PlanError(tuple(dict.fromkeys(faults)))
    return Plan(
        stages=tuple(sorted(stages, key=lambda stage: stage.layer_start)),
        ends=ends,
        max_num_seqs=request.max_num_seqs or MAX_NUM_SEQS,
        max_model_len=request.max_model_len,
        prefill_chunk=request.prefill_chunk or PREFILL_CHUNK,
    )


def even_split(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges that cover `num_layers`, their sizes differing by at most one, larger ones first."""
    size, extra = divmod(num_layers, num_stages)
    starts = [size * index + min(index, extra) for index in range(num_stages + 1)]
    return tuple(itertools.pairwise(starts))


def notes(request: PlanRequest, plan: Plan) -> tuple[str, ...]:
    """What a user should hear about options that touch nothing in this plan."""
    ends = plan.ends
    parts = [stage.device for stage in plan.stages]
    parts += [ends.embedding_device, ends.final_layernorm_device, ends.lm_head_device]
    lines = []
    if request.gpu_precision and not any(is_gpu(device) for device in parts):
        lines.append(f"{_quote(request.gpu_precision)} touches nothing: no part of the model is on a GPU")
    if request.cpu_precision and all(is_gpu(device) for device in parts):
        lines.append(f"{_quote(request.cpu_precision)} touches nothing: no part of the model is on a CPU")
    return tuple(lines)


def _stages(
    request: PlanRequest, num_layers: int, devices: Sequence[str], faults: list[str], limits: ModelLimits | None
) -> list[StagePlan]:
    wishes = request.stages
    if not wishes:
        wishes = _default_stages(request.num_stages, num_layers, faults)
    elif request.num_stages is not None:
        faults.append("--stages splits the layers evenly by itself; use it or --layers, not both")
    ranges = [_range(wish, num_layers, faults) for wish in wishes]
    _check_overlaps(ranges, faults)
    if request.is_complete and None not in ranges and ranges:
        _check_gaps(ranges, num_layers, faults)
    stages = []
    for wish, found in zip(wishes, ranges, strict=True):
        stage = _stage(request, wish, found, devices, faults)
        stages.append(replace(stage, kv_budget_tokens=_kv_budget(request, wish, stage, faults, limits)))
    return stages


def _default_stages(num_stages: int | None, num_layers: int, faults: list[str]) -> tuple[StageRequest, ...]:
    count = 1 if num_stages is None else num_stages
    if not 1 <= count <= num_layers:
        faults.append(f"--stages {count}: the model has {num_layers} layers, so choose between 1 and {num_layers}")
        return ()
    origin = "the stage" if num_stages is None else f"--stages {count}"
    return tuple(StageRequest(origin, "cpu", layers_text(start, end)) for start, end in even_split(num_layers, count))


def _stage(
    request: PlanRequest,
    wish: StageRequest,
    found: _Range | None,
    devices: Sequence[str],
    faults: list[str],
) -> StagePlan:
    device = _device(Option(wish.origin, wish.device), devices, faults, is_here=wish.host is None)
    if wish.host is not None and not HOST_NAME.fullmatch(wish.host):
        faults.append(f"{wish.origin}: {wish.host!r} is no host's name; write what `glmpipe keys list` calls it")
    precision = _device_precision(request, device)
    if wish.precision is not None:
        precision = wish.precision.strip().lower()
        faults += _precision_faults(Option(wish.origin, precision), device)
    num_threads = request.num_threads if wish.num_threads is None else wish.num_threads
    if wish.num_threads is not None:
        faults += out_of_range(wish.origin, "threads", wish.num_threads, MAX_THREADS)
    start, end = (found.start, found.end) if found else (0, 0)
    if wish.host is not None and wish.num_threads is not None:
        faults.append(f"{wish.origin}: threads of {wish.host} are chosen there, with the worker's --threads")
    return StagePlan(device or "cpu", start, end, precision, num_threads, host=wish.host)


def _kv_budget(
    request: PlanRequest, wish: StageRequest, stage: StagePlan, faults: list[str], limits: ModelLimits | None
) -> int | None:
    """In tokens: the stage's own, or the one for all stages."""
    stated = wish if (wish.kv_budget_tokens, wish.kv_budget) != (None, None) else request
    if stated is request and budget_faults(request):
        return None  # told once, not for every stage
    is_known = stage.layer_start < stage.layer_end and stage.precision in PRECISIONS  # otherwise that fault is told
    tokens, found = kv_budget_in_tokens(
        wish.origin, stated.kv_budget_tokens, stated.kv_budget, stage if is_known else None, limits
    )
    faults += found
    return tokens


def _range(wish: StageRequest, num_layers: int, faults: list[str]) -> _Range | None:
    """The half-open range a wish means, cut to the model (and then perhaps empty); None where it cannot be read."""
    layers = f"1-{num_layers}" if wish.layers.strip().lower() == "all" else wish.layers
    match = re.fullmatch(r"\s*(-?[0-9]{1,9})\s*(-\s*([0-9]{1,9})?)?\s*", layers)
    if match is None:
        faults.append(f"{wish.origin}: {wish.layers!r} is not a layer range; write 1-12, 5, 13- (to the last), or all")
        return None
    first = int(match[1])
    last = int(match[3] or (max(first, num_layers) if match[2] else first))
    if first > last:
        faults.append(f"{wish.origin}: layers {first}-{last} run backwards; write {last}-{first}")
        return None
    if first < 1 or last > num_layers:
        culprit = first if first < 1 else last
        faults.append(f"{wish.origin}: layer {culprit} is out of range; the model's layers are 1-{num_layers}")
    start, end = max(first - 1, 0), min(last, num_layers)
    return _Range(start, max(start, end), wish.origin)


def _check_overlaps(ranges: Sequence[_Range | None], faults: list[str]) -> None:
    furthest: _Range | None = None
    for current in sorted(found for found in ranges if found is not None):
        if furthest and current.start < furthest.end:
            faults.append(_overlap(furthest, current))
        if furthest is None or current.end > furthest.end:
            furthest = current


def _check_gaps(ranges: Sequence[_Range | None], num_layers: int, faults: list[str]) -> None:
    """Only meaningful when every range could be read: a malformed one may be what would fill the gap."""
    placed = {layer for found in ranges if found for layer in range(found.start, found.end)}
    missing = [layer for layer in range(num_layers) if layer not in placed]
    for start, end in _runs(missing):
        faults.append(
            f"{_layers(start, end)} in no stage; all {num_layers} layers must be placed, {len(placed)} are"
            f" (add for example --layers cpu={layers_text(start, end)})"
        )


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending layer numbers as half-open ranges of consecutive ones."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer + 1 for layer in layers if layer + 1 not in layers]
    return list(zip(starts, ends, strict=True))


def _overlap(first: _Range, second: _Range) -> str:
    if first == second:
        return f"{first.origin} is given twice; a layer belongs to one stage"
    shared = _layers(second.start, min(first.end, second.end))
    return f"{shared} in two stages, {first.origin} and {second.origin}; a layer belongs to one stage"


def _layers(start: int, end: int) -> str:
    return f"layer {end} is" if end - start == 1 else f"layers {layers_text(start, end)} are"


def _ends(
    request: PlanRequest, stages: Sequence[StagePlan], devices: Sequence[str], faults: list[str], is_quantized: bool
) -> EndsPlan:
    """Both ends: lm_head beside the embeddings, final_layernorm beside lm_head, unless told otherwise."""
    embedding = _device(request.embeddings, devices, faults) if request.embeddings else "cpu"
    lm_head = _device(request.lm_head, devices, faults) if request.lm_head else embedding
    norm = _device(request.final_layernorm, devices, faults) if request.final_layernorm else lm_head
    embedding_precision = _end_precision(request, request.ends_precision, embedding, faults)
    head_wish = request.lm_head_precision or request.ends_precision
    head_precision = _end_precision(request, head_wish, lm_head, faults)
    if head_wish is None and not is_quantized and _quantizes_head(request, stages, lm_head):
        head_precision = request.default_head_precision or HEAD_PRECISION
    return EndsPlan(
        embedding_device=embedding or "cpu",
        embedding_precision=embedding_precision,
        final_layernorm_device=norm or "cpu",
        lm_head_device=lm_head or "cpu",
        lm_head_precision=head_precision,
    )


def _end_precision(request: PlanRequest, wish: Option | None, device: str | None, faults: list[str]) -> str:
    """An end's precision: as wished, else its device's, but not quantised without being asked."""
    if wish is not None:
        faults += _precision_faults(wish, device)
        return wish.text.strip().lower()
    precision = _device_precision(request, device)
    return default_precision(device or "cpu") if precision in QUANTIZED else precision


def _quantizes_head(request: PlanRequest, stages: Sequence[StagePlan], device: str | None) -> bool:
    """Whether lm_head is quantised as all stages are: read for every token, it would be the slowest part of all.

    Not where a float precision was asked for on its device. (And not in a checkpoint that was published quantised: its
    publisher kept lm_head as it was, and so do we. Embeddings are looked up, not multiplied, and stay as they are.)
    """
    asked = _device_wish(request, device or "cpu")
    return all(stage.precision in QUANTIZED for stage in stages) and (
        asked is None or asked.text.strip().lower() in QUANTIZED
    )


def _device_precision(request: PlanRequest, device: str | None) -> str:
    if device is None:
        return "fp32"
    wish = _device_wish(request, device)
    return wish.text.strip().lower() if wish else request.default_precision or default_precision(device)


def _device_wish(request: PlanRequest, device: str) -> Option | None:
    return request.gpu_precision if is_gpu(device) else request.cpu_precision


def _check_precisions(request: PlanRequest, faults: list[str]) -> None:
    if request.gpu_precision:
        faults += _precision_faults(request.gpu_precision, "cuda")
    if request.cpu_precision:
        faults += _precision_faults(request.cpu_precision, "cpu")


def _precision_faults(wish: Option, device: str | None) -> list[str]:
    precision = wish.text.strip().lower()
    if precision not in PRECISIONS:
        remedy = _precision_meant(precision, CPU_PRECISIONS if device == "cpu" else PRECISIONS)
        return [f"{wish.origin}: precision {precision!r} is unknown; {remedy}"]
    if device == "cpu" and precision not in CPU_PRECISIONS:
        return [f"{wish.origin}: {precision} does not compute on a CPU; use bf16 for the same size"]
    return []


def _precision_meant(text: str, known: Sequence[str]) -> str:
    """As `_did_you_mean`; a number of bits says more than letters do: `fp8`, `q8_0` and `8bit` are nearest to int8."""
    bits = re.search(r"32|16|8|4", text)
    same = [name for name in known if bits and name.endswith(bits[0])]
    return _did_you_mean(text, same, cutoff=0.0) if same else _did_you_mean(text, known)


def _device(wish: Option, devices: Sequence[str], faults: list[str], *, is_here: bool = True) -> str | None:
    """The canonical device; None for one that is at fault. What another host has will be seen when it joins."""
    device = parse_device(wish.text)
    if device is None:
        is_any_gpu = wish.text.strip().lower() in ("gpu", "cuda", "nvidia")
        remedy = "did you mean cuda:0?" if is_any_gpu else _did_you_mean(wish.text, devices)
        faults.append(f"{wish.origin}: device {wish.text!r} is unknown; {remedy}")
        return None
    if is_here and device not in devices:
        seen = ", ".join(devices)
        hint = "" if any(map(is_gpu, devices)) else "; torch sees no GPU, so check its driver and its CUDA build"
        faults.append(f"{wish.origin}: device {device} is not on this machine, which has {seen}{hint}")
    return device


def _did_you_mean(text: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    names = list(known)
    close = difflib.get_close_matches(text.lower(), names, n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(names)}"


def _quote(option: Option) -> str:
    return f"{option.origin} {option.text}"
