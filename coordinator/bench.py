"""Runs a workload through a launched model and takes the times. What they mean is `bench_report`'s business."""

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence

import torch

from coordinator.answer import Answer
from coordinator.bench_report import NUM_UNTIMED_STEPS, BenchReport, Measured, Phase, Workload, summarise
from coordinator.chat_model import ChatModel
from coordinator.errors import UsageError
from coordinator.memory import resident_bytes
from coordinator.plan import Plan
from coordinator.roofline import MemoryReader, Roofline, matmul_flops_per_s
from coordinator.timing import StepTiming
from glm.config import ModelConfig
from protocol.client import SamplingParams, TokenPrompt

STEPS_A_READING = 2
Reporter = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and of how much."""


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
    """Prefill every stream, one after the other, then decode all together, reading the devices' memory in between.

    Raises as `run_bench` does.
    """
    answers = [_begin(chat_model, workload, stream) for stream in range(workload.num_streams)]
    try:
        first_token_s, prefill = _prefill(chat_model, answers, report)
        _decode(chat_model, answers, NUM_UNTIMED_STEPS)
        health, resident = chat_model.cluster.health(), resident_bytes()
        readers = {device: MemoryReader(torch.device(device)) for device in devices}
        decode = _decode(chat_model, answers, workload.num_new_tokens, report, tuple(readers.values()))
        bandwidths = {device: reader.bandwidth_bytes_per_s for device, reader in readers.items()}
        return Measured(workload, first_token_s, prefill, decode, health, resident, bandwidths)
    finally:
        for answer in answers:
            chat_model.engine.cancel(answer.sequence)


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
    """A prompt of the same length and two steps: what is allocated, packed and compiled at first use is then there."""
    report("warm-up", 0, 2)
    answer = _begin(chat_model, workload, stream=workload.num_streams)
    try:
        _prefill(chat_model, [answer], lambda *_: None)
        report("warm-up", 1, 2)
        _decode(chat_model, [answer], min(2, workload.num_new_tokens))
    finally:
        chat_model.engine.cancel(answer.sequence)


def _begin(chat_model: ChatModel, workload: Workload, stream: int) -> Answer:
    prompt = TokenPrompt(prompt_ids(chat_model.config, workload.num_prompt_tokens, stream))
    most = workload.tokens_per_stream
    greedy = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), most, ignore_eos=True, greedy=True)
    return chat_model.begin(prompt, greedy)


def prompt_ids(config: ModelConfig, num_tokens: int, stream: int) -> tuple[int, ...]:
    """Any ids, other ones for every stream; a prefix LM's prompt ends with the marks that its layout needs."""
    marks = (config.gmask_id, config.bos_id) if config.is_prefix_lm else ()
    special = {config.mask_id, config.gmask_id, config.bos_id}
    choice = random.Random(stream)
    ids: list[int] = []
    while len(ids) < num_tokens - len(marks):
        token_id = choice.randrange(config.vocab_size)
        if token_id not in special:
            ids.append(token_id)
    return (*ids, *(mark for mark in marks if mark is not None))


def _prefill(chat_model: ChatModel, answers: AbstractSequence[Answer], report: Reporter) -> tuple[float, Phase]:
    """Step until every stream has its first token; seconds until the first stream had it, and the whole."""
    started_s = time.monotonic()
    first_token_s: float | None = None
    timings: list[StepTiming] = []
    num_done = 0
    while num_done < len(answers):
        report("prefill", num_done, len(answers))
        timings.append(_step(chat_model, answers))
        num_done = sum(bool(answer.sequence.new_ids) for answer in answers)
        if num_done and first_token_s is None:
            first_token_s = time.monotonic() - started_s
    assert first_token_s is not None
    return first_token_s, Phase(time.monotonic() - started_s, tuple(timings))


def _decode(
    chat_model: ChatModel,
    answers: AbstractSequence[Answer],
    num_steps: int,
    report: Reporter = lambda *_: None,
    readers: AbstractSequence[MemoryReader] = (),
) -> Phase:
    """So many steps of all streams together; what is read in between does not count."""
    timings, wall_s = [], 0.0
    for step in range(num_steps):
        report("decode", step, num_steps)
        if step % STEPS_A_READING == 0:
            for reader in readers:
                reader.read()
        started_s = time.monotonic()
        timings.append(_step(chat_model, answers))
        wall_s += time.monotonic() - started_s
    return Phase(wall_s, tuple(timings))


def _step(chat_model: ChatModel, answers: AbstractSequence[Answer]) -> StepTiming:
    """One walk of the chain. Raises GenerationError where that did not work for one of the streams."""
    took_part = chat_model.engine.step()
    for answer in answers:
        if answer.sequence.error is not None:
            raise answer.sequence.error
    timing = took_part[0][1]
    assert timing is not None
    return timing
