"""Does the plan fit? What each device is asked to hold, against what it has left: pure arithmetic, before loading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from coordinator.limits import LEAST_KV_TOKENS, longest_context
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.progress import format_bytes
from glm.config import ModelConfig
from glm.cost import activation_bytes, kv_bytes_per_token, stored_bytes
from glm.layout import embedding_unit, layer_unit, lm_head_unit
from glm.precision import Precision

PROCESS_BYTES = 200 * 10**6
"""What a worker's process takes besides weights, activations and caches, once it has joined."""

NUM_ENDS = 2
"""Of all needs, so many are those of the embedding and lm_head; they come last."""

Place = tuple[str, str]
"""A host and a device of it. On one host, all CPU stages share its memory."""


@dataclass(frozen=True, slots=True)
class Need:
    """What one part of the plan takes in one place, in bytes. `kv_tokens` None: as many as there is room for."""

    part: str
    place: Place
    weight_bytes: int
    work_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv_tokens: int | None = None

    def num_bytes(self, default_kv_tokens: int) -> int:
        """All of it."""
        tokens = default_kv_tokens if self.kv_tokens is None else self.kv_tokens
        return self.weight_bytes + self.work_bytes + tokens * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class Verdict:
    """`lines`: what each place needs and has. `shortages`: the same and more, for each place where it does not fit.

    `kv_tokens` is the budget of stages that have none of their own: as wished, or less where memory ends before.
    """

    lines: tuple[str, ...]
    shortages: tuple[str, ...]
    kv_tokens: int


def memory_needs(plan: Plan, config: ModelConfig, hosts: Sequence[str], own_host: str) -> tuple[Need, ...]:
    """The needs of every stage (`hosts` has theirs) and of both ends, which are on the coordinator's own host."""
    stages = [
        _stage_need(number, stage, config, host, _tokens_a_step(plan, config))
        for number, (stage, host) in enumerate(zip(plan.stages, hosts, strict=True), start=1)
    ]
    return (*stages, *_end_needs(plan.ends, config, own_host))


def judge(needs: Sequence[Need], available: Mapping[Place, int], most_kv_tokens: int, max_context: int) -> Verdict:
    """Hold the needs against what is available in each place."""
    kv_tokens = most_kv_tokens
    for place, free_bytes in available.items():
        here = [need for need in needs if need.place == place]
        rate = sum(need.kv_bytes_per_token for need in here if need.kv_tokens is None)
        if rate:
            # Caches grow by half at a time, so that a third of what they hold may be unused.
            left = (free_bytes - sum(need.num_bytes(0) for need in here)) * 2 // 3
            kv_tokens = min(kv_tokens, left // rate)
    kv_tokens = max(kv_tokens, min(LEAST_KV_TOKENS, max_context))
    lines, shortages = [], []
    for place, free_bytes in available.items():
        here = [need for need in needs if need.place == place]
        needed = sum(need.num_bytes(kv_tokens) for need in here)
        name = f"{place[1]} of {place[0]}" if len({host for host, _ in available}) > 1 else place[1]
        lines.append(_line(name, here, needed, free_bytes, kv_tokens))
        if needed > free_bytes:
            shortages.append(_shortage(place, here, needed, free_bytes, kv_tokens))
    return Verdict(tuple(lines), tuple(shortages), kv_tokens)


def precision_that_fits(
    plan: Plan, config: ModelConfig, hosts: Sequence[str], own_host: str, available: Mapping[Place, int]
) -> str | None:
    """The highest precision below the plan's at which all stages together would fit, None if there is none."""
    longest = longest_context(plan, config.max_context)
    for precision in ("bf16", "int8", "int4"):
        bits = Precision(precision).bits
        lower = tuple(replace(s, precision=precision) if bits < Precision(s.precision).bits else s for s in plan.stages)
        needs = memory_needs(replace(plan, stages=lower), config, hosts, own_host)
        if lower != plan.stages and not judge(needs, available, LEAST_KV_TOKENS, longest).shortages:
            return precision
    return None


def _tokens_a_step(plan: Plan, config: ModelConfig) -> int:
    """The most that a step feeds: a prefix LM's prompts stay whole, the others' come in pieces, answers one by one."""
    whole = longest_context(plan, config.max_context) if config.is_prefix_lm else 0
    return max(whole, plan.prefill_chunk, plan.max_num_seqs)


def _stage_need(number: int, stage: StagePlan, config: ModelConfig, host: str, num_tokens: int) -> Need:
    precision, device_type = Precision(stage.precision), stage.device.partition(":")[0]
    dtype = _dtype(precision, device_type)
    num_layers = stage.layer_end - stage.layer_start
    layers = range(stage.layer_start, stage.layer_end)
    return Need(
        part=f"stage {number} (layers {stage.layers_text}, {stage.precision})",
        place=(host, stage.device),
        weight_bytes=sum(stored_bytes(layer_unit(config, layer), precision, dtype) for layer in layers),
        work_bytes=PROCESS_BYTES + activation_bytes(config, num_tokens, precision, device_type),
        kv_bytes_per_token=kv_bytes_per_token(config, num_layers, precision, device_type),
        kv_tokens=stage.kv_budget_tokens,
    )


def _end_needs(ends: EndsPlan, config: ModelConfig, host: str) -> tuple[Need, ...]:
    table, head = Precision(ends.embedding_precision), Precision(ends.lm_head_precision)
    table_dtype = _dtype(table, ends.embedding_device.partition(":")[0])
    stored = getattr(torch, config.stored_dtype)
    if not table.is_quantized and stored.itemsize < table_dtype.itemsize:
        table_dtype = stored  # a table that is only looked up stays as narrow as it was published
    head_dtype = _dtype(head, ends.lm_head_device.partition(":")[0])
    is_shared = config.tied_ends and (table, ends.embedding_device) == (head, ends.lm_head_device)
    return (
        Need(
            f"embeddings ({ends.embedding_precision})",
            (host, ends.embedding_device),
            0 if is_shared else stored_bytes(embedding_unit(config), table, table_dtype),
        ),
        Need(
            f"lm_head ({ends.lm_head_precision})",
            (host, ends.lm_head_device),
            stored_bytes(lm_head_unit(config), head, head_dtype),
        ),
    )


def _dtype(precision: Precision, device_type: str) -> torch.dtype:
    """Of what is not quantised."""
    names = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}
    return names.get(precision, torch.float16 if device_type == "cuda" else torch.float32)


def _line(name: str, here: Sequence[Need], needed: int, free_bytes: int, kv_tokens: int) -> str:
    text = f"memory of {name}: {format_bytes(needed)} needed, {format_bytes(free_bytes)} available"
    rate = sum(need.kv_bytes_per_token for need in here)
    if not rate:
        return text
    weights = sum(need.weight_bytes for need in here)
    tokens = max(kv_tokens if n.kv_tokens is None else n.kv_tokens for n in here if n.kv_bytes_per_token)
    return f"{text} (weights {format_bytes(weights)}, up to {tokens} KV tokens)"


def _shortage(place: Place, here: Sequence[Need], needed: int, free_bytes: int, kv_tokens: int) -> str:
    parts = []
    for need in here:
        tokens = kv_tokens if need.kv_tokens is None else need.kv_tokens
        text = f"{need.part} {format_bytes(need.weight_bytes)} of weights"
        if need.kv_bytes_per_token:
            kv = format_bytes(tokens * need.kv_bytes_per_token)
            text += f", {kv} of KV cache for {tokens} tokens, {format_bytes(need.work_bytes)} to compute"
        parts.append(text)
    host, device = place
    return (
        f"{device} of {host} has {format_bytes(free_bytes)} available, {format_bytes(needed)} are needed: "
        + "; ".join(parts)
    )
