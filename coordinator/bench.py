"""Runs a workload through a launched model and takes the times. What they mean is `bench_report`'s business."""

from collections.abc import Sequence as AbstractSequence
from dataclasses import replace

import torch

from coordinator.bench_report import NUM_UNTIMED_STEPS, BenchReport, Measured, Workload, summarise
from coordinator.bench_streams import Reporter, Streams
from coordinator.chat_model import ChatModel
from coordinator.errors import UsageError
from coordinator.memory import resident_bytes
from coordinator.plan import Plan
from coordinator.roofline import MemoryReader, Roofline, matmul_flops_per_s
from coordinator.scheduler import HEADROOM_TOKENS
from glm.config import ModelConfig

SHORT_PROMPT = 8
MOST_TRIAL_ROUNDS = 60
"""Rounds in which the engine may try how many steps to have in flight, before anything is timed."""


def check_workload(workload: Workload, config: ModelConfig) -> None:
    """Raises UsageError where the model's context does not hold it."""
    needed = workload.tokens_per_stream + 1
    if needed > config.max_context:
        raise UsageError(
            f"a prompt of {workload.num_prompt_tokens} tokens and {workload.num_new_tokens} new ones need a context of "
            f"{needed}, {config.name or 'the model'} has {config.max_context}: ask for fewer"
        )
    if config.is_prefix_lm and workload.num_prompt_tokens < 3:
        raise UsageError(f"--prompt-tokens {workload.num_prompt_tokens}: a prompt of this family has 3 at least")


def run_bench(chat_model: ChatModel, workload: Workload, report: Reporter, warm: bool = False) -> BenchReport:
    """Warm up (unless that was done before: `warm`), then measure the workload, and the machine around and in it.

    The machine is measured with the threads that torch has in this process; the caller sets as many as the stages have.

    Raises:
        UsageError: the model's context is too small. GenerationError: a stage could not do it. StageLost: one is gone.
    """
    check_workload(workload, chat_model.config)
    devices = _devices(chat_model.cluster.plan)
    if not warm:
        warm_up(chat_model, workload, report)
    before = _matmuls(devices, report)
    measured = measure(chat_model, workload, report, devices)
    after = _matmuls(devices, report)
    best = {device: max(before[device], after[device]) for device in devices}  # disturbances only ever slow it down
    return summarise(chat_model, measured, {d: Roofline(measured.read_bandwidths[d], *best[d]) for d in devices})


def measure(
    chat_model: ChatModel, workload: Workload, report: Reporter, devices: AbstractSequence[str] = ()
) -> Measured:
    """Prefill all streams, then decode them together, reading the devices' memory in between.

    Raises as `run_bench` does.
    """
    check_room(chat_model, workload)
    with Streams(chat_model, workload) as streams:
        first_token_s, prefill = streams.prefill(report)
        streams.rounds(NUM_UNTIMED_STEPS)
        health, resident = chat_model.cluster.health(), resident_bytes()
        readers = {device: MemoryReader(torch.device(device)) for device in devices}
        decode = streams.decode(report, tuple(readers.values()))
    bandwidths = {device: reader.bandwidth_bytes_per_s for device, reader in readers.items()}
    return Measured(workload, first_token_s, prefill, decode, health, resident, bandwidths)


def check_room(chat_model: ChatModel, workload: Workload) -> None:
    """Raises UsageError where the streams cannot all run at the same time."""
    settings = chat_model.engine.settings
    if settings.max_num_seqs < workload.num_streams:
        raise UsageError(f"{workload.num_streams} streams, but max_num_seqs is {settings.max_num_seqs}: raise it")
    needed = kv_tokens(workload)
    if settings.kv_budget_tokens < needed:
        raise UsageError(
            f"{workload.num_streams} streams need {needed} tokens of KV cache, the tightest stage has "
            f"{settings.kv_budget_tokens}: raise its KV budget, or ask for less"
        )


def kv_tokens(workload: Workload) -> int:
    """KV cache that the streams need to run all at once, none of them waiting or set back."""
    return workload.num_streams * (workload.tokens_per_stream + HEADROOM_TOKENS)


def _devices(plan: Plan) -> tuple[str, ...]:
    """Those that read weights for every token, each once."""
    return tuple(dict.fromkeys([*(stage.device for stage in plan.stages), plan.ends.lm_head_device]))


def _matmuls(devices: AbstractSequence[str], report: Reporter) -> dict[str, tuple[float, str]]:
    found = {}
    for index, device in enumerate(devices):
        report("what the machine can do at best", index, len(devices))
        found[device] = matmul_flops_per_s(torch.device(device))
    return found


def warm_up(chat_model: ChatModel, workload: Workload, report: Reporter) -> None:
    """A prompt of the same length and two steps: what is allocated, packed and compiled at first use is then there.

    Several streams over several stages go on with short prompts until the engine has tried how to deal them out.
    """
    report("warm-up", 0, 2)
    with Streams(chat_model, replace(workload, num_streams=1), first=workload.num_streams) as streams:
        streams.prefill(lambda *_: None)
        streams.rounds(min(2, workload.num_new_tokens))
    report("warm-up", 1, 2)
    pacing, num_prompt = chat_model.engine.pacing, min(workload.num_prompt_tokens, SHORT_PROMPT)
    if pacing.has_tried_all(workload.num_streams):
        return
    with Streams(chat_model, Workload(num_prompt, MOST_TRIAL_ROUNDS, workload.num_streams)) as streams:
        streams.prefill(lambda *_: None)
        for _ in range(min(MOST_TRIAL_ROUNDS, workload.tokens_per_stream - num_prompt - 2)):
            if pacing.has_tried_all(workload.num_streams):
                break
            streams.rounds(1)
