"""The plan: which device holds which layers at which precision, and where both ends of the model live.

A `Plan` is what the coordinator carries out. It is not what a user wrote: that is a
`plan_request.PlanRequest`, which `planning.resolve` turns into a plan once the number of layers and the
devices are known. Devices are named `cpu` and `cuda:N`, precisions `fp32 bf16 fp16 int8 int4`. Layer ranges
are half-open here and 1-based inclusive in every text.
"""

import re
from dataclasses import dataclass

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
QUANTIZED = ("int8", "int4")
CPU_PRECISIONS = ("fp32", "bf16", "int8", "int4")
MAX_NUM_SEQS = 64
"""Sequences that run at the same time, unless the plan says otherwise."""
PREFILL_CHUNK = 256
"""Prompt tokens in one step, unless the plan says otherwise: so few that others' answers are not held up."""
MAX_UNGROUPED_LAYERS = 8
"""Up to this many layers in the model, every layer is described on a line of its own."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: a worker process that holds layers `[layer_start, layer_end)`.

    `num_threads` None leaves the choice to the launcher: all usable cores, because stages take turns.
    `kv_budget_tokens` None leaves the size of the KV cache to the coordinator, which knows the model's context.
    `host` None is this host; another one is called as the keys of its workers are (`glmpipe keys list`).
    """

    device: str
    layer_start: int
    layer_end: int
    precision: str
    num_threads: int | None = None
    kv_budget_tokens: int | None = None
    host: str | None = None

    @property
    def num_layers(self) -> int:
        """How many layers the stage holds."""
        return self.layer_end - self.layer_start

    @property
    def layers_text(self) -> str:
        """The layers as a user reads them: `1-12`, or `5` for a single one."""
        return layers_text(self.layer_start, self.layer_end)


@dataclass(frozen=True, slots=True)
class EndsPlan:
    """Where the coordinator keeps the embedding, final_layernorm and lm_head."""

    embedding_device: str
    embedding_precision: str
    final_layernorm_device: str
    lm_head_device: str
    lm_head_precision: str

    @property
    def final_layernorm_precision(self) -> str:
        """As lm_head's where they share a device, but never quantised."""
        if self.lm_head_precision in QUANTIZED or self.lm_head_device != self.final_layernorm_device:
            return default_precision(self.final_layernorm_device)
        return self.lm_head_precision


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages in the order of their layers, both ends, and how much goes through them at once.

    At most `max_num_seqs` sequences run at the same time, the others wait. A prompt and its answer have at most
    `max_model_len` tokens together, None for as many as the model allows. A step feeds at most `prefill_chunk` tokens
    of prompts; a prefix LM's prompt stays whole.
    """

    stages: tuple[StagePlan, ...]
    ends: EndsPlan
    max_num_seqs: int = MAX_NUM_SEQS
    max_model_len: int | None = None
    prefill_chunk: int = PREFILL_CHUNK

    @property
    def num_layers(self) -> int:
        """How many layers the model has according to this plan."""
        return self.stages[-1].layer_end

    def place(self, device: str, host: str | None = None) -> str:
        """A device as a user reads it: `cuda:0`; where the plan has stages of several hosts, `cuda:0 of lab2`."""
        if all(stage.host is None for stage in self.stages):
            return device
        return f"{device} of {host or 'this host'}"


def layers_text(start: int, end: int) -> str:
    """`[start, end)` as a user reads it, `1-12` or `5`."""
    return str(end) if end - start == 1 else f"{start + 1}-{end}"


def parse_device(text: str) -> str | None:
    """`cpu`, `cuda:N` or `cuda` (the first one) in its canonical spelling; None for anything else."""
    match = re.fullmatch(r"(cpu)|cuda(?::([0-9]{1,3}))?", text.strip().lower())
    if match is None:
        return None
    return "cpu" if match[1] else f"cuda:{int(match[2] or 0)}"


def is_gpu(device: str) -> bool:
    """Whether a canonical device name means a GPU."""
    return device.startswith("cuda")


def default_precision(device: str) -> str:
    """What a device holds layers at when nobody said otherwise."""
    return "fp16" if is_gpu(device) else "fp32"


def wants_native_kernels(plan: Plan) -> bool:
    """Whether a part on a CPU has weights that the native kernels were made for."""
    held = [(stage.device, stage.precision) for stage in plan.stages]
    held.append((plan.ends.lm_head_device, plan.ends.lm_head_precision))
    return any(not is_gpu(device) and precision != "fp32" for device, precision in held)


def available_devices() -> tuple[str, ...]:
    """The devices of this machine, `cpu` first. Imports torch, so ask only when about to launch."""
    import torch

    return ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))


def describe(plan: Plan, *, verbose: bool = False) -> tuple[str, ...]:
    """One line for each part, in the order a token meets them: `layers 1-12 -> int8 -> cuda:1`.

    Every layer gets its own line when the model is small or `verbose` is set.
    """
    ends = plan.ends
    one_by_one = verbose or plan.num_layers <= MAX_UNGROUPED_LAYERS
    lines = [_line("embeddings", ends.embedding_precision, plan.place(ends.embedding_device))]
    for stage in plan.stages:
        parts = _parts(stage, one_by_one)
        lines += [_line(part, stage.precision, plan.place(stage.device, stage.host)) for part in parts]
    lines.append(_line("final_layernorm", ends.final_layernorm_precision, plan.place(ends.final_layernorm_device)))
    lines.append(_line("lm_head", ends.lm_head_precision, plan.place(ends.lm_head_device)))
    return tuple(lines)


def describe_stages(plan: Plan) -> tuple[str, ...]:
    """A line for each stage, by its number, and each part of the ends: `stage 1, layers 1-12 -> int8 -> cuda:1`."""
    first, *_, norm, lm_head = describe(plan)
    stages = [
        _line(f"stage {number}, {part}", stage.precision, plan.place(stage.device, stage.host))
        for number, stage in enumerate(plan.stages, start=1)
        for part in _parts(stage, one_by_one=False)
    ]
    return (first, *stages, norm, lm_head)


def _parts(stage: StagePlan, one_by_one: bool) -> list[str]:
    if one_by_one or stage.layer_end - stage.layer_start == 1:
        return [f"layer {layer + 1}" for layer in range(stage.layer_start, stage.layer_end)]
    return [f"layers {stage.layers_text}"]


def _line(part: str, precision: str, device: str) -> str:
    return f"{part} -> {precision} -> {device}"
