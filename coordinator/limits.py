"""How much may go through a plan at once: what the model allows, what was wished, what comes of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.plan import Plan, StagePlan
from coordinator.plan_request import PlanRequest
from protocol.limits import MAX_STEP_BYTES

if TYPE_CHECKING:
    from glm.config import ModelConfig

MAX_KV_TOKENS = 2**31 - 1
MAX_THREADS = 4096
KV_BUDGET_CONTEXTS = 4
"""Without a KV budget in the plan, stages may cache so many of the longest contexts that the plan allows."""
LEAST_KV_TOKENS = 2048
"""A stage without a KV budget of its own must have room for so many tokens, or for a whole context if that is less."""
MOST_SEQS = 4096
MOST_PREFILL_CHUNK = 65536
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("kmgt", start=1)}


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a model allows a plan: `max_context` tokens, tokens in a step, KV bytes for each one that a stage caches."""

    max_context: int
    kv_bytes_per_token: Callable[[StagePlan], int]
    max_step_tokens: int


def limits_of(config: ModelConfig) -> ModelLimits:
    """Of a model of this shape. Imports torch, so ask only when about to launch."""
    from glm.cost import kv_bytes_per_token
    from glm.precision import Precision

    def kv_bytes(stage: StagePlan) -> int:
        num_layers, device_type = stage.layer_end - stage.layer_start, stage.device.partition(":")[0]
        return kv_bytes_per_token(config, num_layers, Precision(stage.precision), device_type)

    return ModelLimits(config.max_context, kv_bytes, max_step_tokens(config))


def max_step_tokens(config: ModelConfig) -> int:
    """Most tokens of one step: their hidden states, fp32 at worst, must fit into a message."""
    return max(1, MAX_STEP_BYTES // (4 * config.hidden_size))


def parse_bytes(text: str) -> int | None:
    """`2GiB`, `1.5 GB`, `300M`, `4096 B`: bytes. None for anything else, a number without a unit included."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmgt]i?)b?|b)", text.strip().lower())
    return None if match is None else int(float(match[1]) * _UNITS[match[2] or ""])


def traffic_faults(request: PlanRequest, limits: ModelLimits | None) -> list[str]:
    """What is wrong with the settings of the plan as a whole, as far as `limits` are known."""
    most_tokens = MAX_KV_TOKENS if limits is None else limits.max_context
    why = "" if limits is None else ", the model's context"
    most_chunk = MOST_PREFILL_CHUNK if limits is None else min(MOST_PREFILL_CHUNK, limits.max_step_tokens)
    why_chunk = ", which one message carries" if most_chunk < MOST_PREFILL_CHUNK else ""
    faults = [
        f"{name} {value} is out of range; it must be from {least} to {most}{reason}"
        for name, value, least, most, reason in (
            ("max_num_seqs", request.max_num_seqs, 1, MOST_SEQS, ""),
            ("max_model_len", request.max_model_len, 2, most_tokens, why),
            ("prefill_chunk", request.prefill_chunk, 1, most_chunk, why_chunk),
        )
        if value is not None and not least <= value <= most
    ]
    if request.num_threads is not None:
        faults += out_of_range("--threads", "", request.num_threads, MAX_THREADS)
    return faults + budget_faults(request)


def budget_faults(request: PlanRequest) -> list[str]:
    """What is wrong with the KV budget for all stages, whichever these are."""
    if request.kv_budget is not None and request.kv_budget_tokens is not None:
        return [_both_given("", request.kv_budget_tokens, request.kv_budget)]
    if request.kv_budget is not None and parse_bytes(request.kv_budget) is None:
        return [f"--kv-budget {no_size(request.kv_budget)}"]
    if request.kv_budget_tokens is not None:
        return out_of_range("--kv-budget-tokens", "", request.kv_budget_tokens, MAX_KV_TOKENS)
    return []


def kv_budget_in_tokens(
    origin: str, num_tokens: int | None, size: str | None, stage: StagePlan | None, limits: ModelLimits | None
) -> tuple[int | None, list[str]]:
    """A stage's KV budget, however it was stated, and what is wrong with it.

    Where `stage` is None its layers or precision are at fault, and a size is only looked at, not turned into tokens.
    """
    if num_tokens is not None and size is not None:
        return None, [_both_given(f"{origin}: ", num_tokens, size)]
    if size is None:
        wrong = [] if num_tokens is None else out_of_range(origin, "kv_budget_tokens", num_tokens, MAX_KV_TOKENS)
        return num_tokens, wrong
    num_bytes = parse_bytes(size)
    if num_bytes is None:
        return None, [f"{origin}: kv_budget {no_size(size)}"]
    if limits is None:
        return None, [f"{origin}: kv_budget {size} means nothing without a model; use kv_budget_tokens"]
    if stage is None:
        return None, []
    rate = limits.kv_bytes_per_token(stage)
    held = num_bytes // rate
    if not 1 <= held <= MAX_KV_TOKENS:
        needs = f"a token takes {rate} bytes in this stage, and a budget holds from 1 to {MAX_KV_TOKENS} tokens"
        return None, [f"{origin}: kv_budget {size} is out of range; {needs}"]
    return held, []


def out_of_range(origin: str, name: str, value: int, most: int) -> list[str]:
    """A fault if `value` is not from 1 to `most`. `name` is empty where `origin` is the option itself."""
    if 1 <= value <= most:
        return []
    what = f"{origin}: {name}" if name else origin
    return [f"{what} {value} is out of range; it must be from 1 to {most}"]


def no_size(text: str) -> str:
    """What to tell somebody whose text `parse_bytes` does not take."""
    return f"{text!r} is not a size; write a number and a unit, such as 2GiB or 800MB"


def longest_context(plan: Plan, max_context: int, kv_budgets: Sequence[int] = ()) -> int:
    """Most tokens of prompt and answer together; `kv_budgets` are the stages' own, in tokens."""
    return min(max_context, plan.max_model_len or max_context, *kv_budgets)


def default_kv_tokens(plan: Plan, max_context: int) -> int:
    """The KV budget of stages that state none, if there is memory for it; short requests need not be few at once."""
    return max(KV_BUDGET_CONTEXTS * longest_context(plan, max_context), min(LEAST_KV_TOKENS, max_context))


def context_line(plan: Plan, max_context: int, kv_budgets: Sequence[int]) -> str:
    """For the start-up report: the longest context, and what sets it."""
    longest = longest_context(plan, max_context, kv_budgets)
    text = f"longest context: {longest} tokens"
    if longest == max_context:
        return f"{text}, the model's own"
    if longest == plan.max_model_len:
        return f"{text}, the plan's max_model_len (the model's own is {max_context})"
    tightest = list(kv_budgets).index(longest)
    stage = plan.stages[tightest]
    return (
        f"{text}, the KV budget of stage {tightest + 1} ({plan.place(stage.device, stage.host)}, layers "
        f"{stage.layers_text}); the model's own is {max_context}"
    )


def _both_given(where: str, num_tokens: int, size: str) -> str:
    return f"{where}kv_budget_tokens {num_tokens} and kv_budget {size} are both given; state the budget in one way"
