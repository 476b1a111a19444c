"""What a measured workload says about speed: pure arithmetic over times, bytes and the machine's limits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from coordinator.chat_model import ChatModel
from coordinator.plan import Plan
from coordinator.roofline import Roofline
from coordinator.timing import EndsShare, StageShare, StepTiming
from glm.cost import prefill_flops
from protocol.control import Pong

NUM_UNTIMED_STEPS = 1
"""Rounds of decoding before the timed ones: the first step of a new size prepares what others reuse."""
STEPS_A_READING = 4
"""Timed rounds of a single stream between two readings of memory."""
ROUNDS_A_READING = 16
"""The same of several streams, where the chain is emptied for each reading and then filled again."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts of so many tokens, then so many timed decode steps of all streams together."""

    num_prompt_tokens: int
    num_new_tokens: int
    num_streams: int

    @property
    def rounds_a_reading(self) -> int:
        """Timed rounds between two readings of memory."""
        return STEPS_A_READING if self.num_streams == 1 else ROUNDS_A_READING

    @property
    def num_untimed_rounds(self) -> int:
        """At most: before the timed ones, and where the chain is emptied and filled around readings."""
        readings = -(-self.num_new_tokens // self.rounds_a_reading)
        return NUM_UNTIMED_STEPS + 2 * readings + 2

    @property
    def tokens_per_stream(self) -> int:
        """The prompt, the token that comes out of its prefill, and one for each round."""
        return self.num_prompt_tokens + 1 + self.num_untimed_rounds + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps, the seconds that they took together, and the new tokens that came out of them."""

    wall_s: float
    timings: tuple[StepTiming, ...]
    num_new_tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of a workload took.

    `health` is the stages' after the prefill, `resident_bytes` the coordinator's; `read_bandwidths` are those of the
    devices that were asked for, between the decode steps.
    """

    workload: Workload
    first_token_s: float
    prefill: Phase
    decode: Phase
    health: tuple[Pong, ...]
    resident_bytes: int
    read_bandwidths: Mapping[str, float]

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens of all streams over the time until the last of them had its first token."""
        return self.workload.num_streams * self.workload.num_prompt_tokens / self.prefill.wall_s

    @property
    def decode_step_s(self) -> float:
        """Seconds a round, in which every stream gets a token, by one step or by several in flight."""
        return self.workload.num_streams / self.decode_tokens_per_s

    @property
    def decode_tokens_per_s(self) -> float:
        """All streams together."""
        return self.decode.num_new_tokens / self.decode.wall_s


@dataclass(frozen=True, slots=True)
class PartReport:
    """What one process did: seconds over prefill and decode together, and those of decode alone.

    `busy_share` is `compute_s` over the measured time; with several steps in flight the sum of all parts' passes 1. For
    a stage, `wire_s` is the step's travel to it, waiting for its turn included (and back to the coordinator from the
    last one); for the coordinator the way back alone. `weight_bytes` of the coordinator are lm_head's: of the
    embeddings a token needs one row.
    """

    device: str
    layers: str
    precision: str
    compute_s: float
    wire_s: float
    busy_share: float
    decode_compute_s: float
    decode_wire_s: float
    resident_bytes: int
    weight_bytes: int
    kernel_path: str


@dataclass(frozen=True, slots=True)
class BenchReport:
    """The outcome, with the names of `glmpipe bench --json`.

    `decode_step_s` is a round: a token for each stream, by one step or by several in flight.
    `decode_efficiency`: bytes of weights that a round needs at least, times rounds a second, over the read bandwidth
    between the rounds.
    `prefill_efficiency`: operations a second of the prefill over those of a large matmul. Where parts are on several
    devices, bandwidth and matmul are what those devices reach when they take turns with their parts.
    """

    model: str
    precision: str
    prompt_tokens: int
    new_tokens: int
    streams: int
    threads: int
    torch_version: str
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    time_to_first_token_s: float
    decode_step_s: float
    decode_efficiency: float
    prefill_efficiency: float
    read_bandwidth_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_dtype: str
    step_weight_bytes: int
    pacing: str | None
    stages: tuple[PartReport, ...]
    coordinator: PartReport

    @property
    def context(self) -> tuple[int, int]:
        """Cached tokens of a stream before the first and after the last timed decode step."""
        workload = Workload(self.prompt_tokens, self.new_tokens, self.streams)
        return self.prompt_tokens + NUM_UNTIMED_STEPS, workload.tokens_per_stream - 1


def summarise(chat_model: ChatModel, measured: Measured, rooflines: Mapping[str, Roofline]) -> BenchReport:
    """Everything that is reported, from what was measured; `rooflines` by device."""
    plan, ready, workload = chat_model.cluster.plan, chat_model.cluster.ready, measured.workload
    stages = tuple(_stage(chat_model, index, measured) for index in range(len(plan.stages)))
    ends = _ends(chat_model, measured)
    step_bytes = sum(part.weight_bytes for part in (*stages, ends))
    bandwidth = step_bytes / sum(
        part.weight_bytes / rooflines[part.device].read_bandwidth_bytes_per_s for part in (*stages, ends)
    )
    flops = matmul_flops(plan, rooflines)
    num_operations = workload.num_streams * prefill_flops(chat_model.config, workload.num_prompt_tokens)
    return BenchReport(
        model=chat_model.config.name or chat_model.model_dir.name,
        precision="/".join(dict.fromkeys(stage.precision for stage in plan.stages)),
        prompt_tokens=workload.num_prompt_tokens,
        new_tokens=workload.num_new_tokens,
        streams=workload.num_streams,
        threads=torch.get_num_threads(),
        torch_version=str(torch.__version__),
        load_s=max(message.load_s for message in ready),
        prefill_tokens_per_s=measured.prefill_tokens_per_s,
        decode_tokens_per_s=measured.decode_tokens_per_s,
        time_to_first_token_s=measured.first_token_s,
        decode_step_s=measured.decode_step_s,
        decode_efficiency=step_bytes / measured.decode_step_s / bandwidth,
        prefill_efficiency=num_operations / measured.prefill.wall_s / flops,
        read_bandwidth_bytes_per_s=bandwidth,
        matmul_flops_per_s=flops,
        matmul_dtype="/".join(dict.fromkeys(roofline.matmul_dtype for roofline in rooflines.values())),
        step_weight_bytes=step_bytes,
        pacing=chat_model.engine.pacing.reason(),
        stages=stages,
        coordinator=ends,
    )


def matmul_flops(plan: Plan, rooflines: Mapping[str, Roofline]) -> float:
    """What the stages' devices reach together when each does its layers' share, one after the other."""
    spent = sum((s.layer_end - s.layer_start) / rooflines[s.device].matmul_flops_per_s for s in plan.stages)
    return plan.num_layers / spent


def _stage(chat_model: ChatModel, index: int, measured: Measured) -> PartReport:
    stage, ready = chat_model.cluster.plan.stages[index], chat_model.cluster.ready[index]
    return _part(
        measured,
        lambda timing: timing.stages[index],
        device=chat_model.cluster.plan.place(stage.device, stage.host),
        layers=stage.layers_text,
        precision=stage.precision,
        resident_bytes=measured.health[index].resident_bytes,
        weight_bytes=ready.weight_bytes,
        kernel_path=ready.kernel_path,
    )


def _ends(chat_model: ChatModel, measured: Measured) -> PartReport:
    ends, head = chat_model.cluster.plan.ends, chat_model.engine.head
    return _part(
        measured,
        lambda timing: timing.ends,
        device=ends.lm_head_device,
        layers="ends",
        precision=ends.lm_head_precision,
        resident_bytes=measured.resident_bytes,
        weight_bytes=head.num_bytes,
        kernel_path=head.kernel_path,
    )


def _part(measured: Measured, share: Callable[[StepTiming], StageShare | EndsShare], **what: Any) -> PartReport:
    """A part's report from its share of every step."""
    phases = (measured.prefill, measured.decode)
    compute_s = [sum(share(timing).compute_s for timing in phase.timings) for phase in phases]
    wire_s = [sum(share(timing).wire_s for timing in phase.timings) for phase in phases]
    return PartReport(
        compute_s=sum(compute_s),
        wire_s=sum(wire_s),
        busy_share=sum(compute_s) / sum(phase.wall_s for phase in phases),
        decode_compute_s=compute_s[1],
        decode_wire_s=wire_s[1],
        **what,
    )
