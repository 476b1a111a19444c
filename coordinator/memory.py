"""How much memory this process holds, and whether a plan fits into what the devices have left."""

import os
import platform
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from coordinator.errors import NotEnoughMemory
from coordinator.limits import longest_context
from coordinator.memory_plan import NUM_ENDS, Need, Place, judge, memory_needs, precision_that_fits
from coordinator.plan import Plan
from glm.config import ModelConfig
from glm.host_memory import host_memory
from protocol.control import Join

NoteSink = Callable[[str], None]


def resident_bytes() -> int:
    """The resident set, in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fitting_kv_budget(
    plan: Plan,
    config: ModelConfig,
    joins: Sequence[Join],
    most_kv_tokens: int,
    on_note: NoteSink | None = None,
    *,
    refuse: bool = True,
) -> int:
    """The KV budget of stages that state none: `most_kv_tokens`, or as many as there is memory for.

    Says through `on_note` what each device needs and has.

    Raises:
        NotEnoughMemory: the plan does not fit, unless `refuse` is false.
    """
    hosts, own_host = [join.host for join in joins], platform.node() or "localhost"
    needs = memory_needs(plan, config, hosts, own_host)
    available = _available(needs, joins, own_host)
    verdict = judge(needs, available, most_kv_tokens, longest_context(plan, config.max_context))
    if on_note is not None:
        for line in verdict.lines:
            on_note(line)
    if verdict.shortages and refuse:
        lower = precision_that_fits(plan, config, hosts, own_host, available)
        remedy = f"all of it would fit in {lower}" if lower else "no precision would make it fit"
        raise NotEnoughMemory(
            f"the plan does not fit into memory, nothing was loaded: {'. '.join(verdict.shortages)}. Choose a lower "
            f"precision ({remedy}), more stages on other devices, or a smaller --kv-budget-tokens; --no-memory-check "
            "loads it all the same"
        )
    return verdict.kv_tokens


def available_again(
    needs: Sequence[Need], joins: Sequence[Join], own_host: str, held: Mapping[Place, int]
) -> dict[Place, int]:
    """What every place will have once workers that serve have given back what they hold, for needs of another plan.

    The ends, last of the needs, stay where they are and count as free as well.
    """
    available: dict[Place, int] = {}
    for place in dict.fromkeys(need.place for need in needs):
        found = [join.memory_free_bytes for join in joins if (join.host, join.device) == place]
        ends = sum(need.weight_bytes for need in needs[-NUM_ENDS:] if need.place == place)
        if place == (own_host, "cpu"):
            available[place] = host_memory()[1] + held.get(place, 0) + ends
        elif found:
            available[place] = max(found)  # of the time before any of them held anything
        else:
            available[place] = torch.cuda.mem_get_info(torch.device(place[1]))[0] + ends
    return available


def _available(needs: Sequence[Need], joins: Sequence[Join], own_host: str) -> dict[Place, int]:
    """What every place has left: as the workers there found it when they joined, or as it is found now."""
    available: dict[Place, int] = {}
    for place in dict.fromkeys(need.place for need in needs):
        found = [join.memory_free_bytes for join in joins if (join.host, join.device) == place]
        if place == (own_host, "cpu"):
            found.append(host_memory()[1])
        elif place[0] == own_host and not found:
            found.append(torch.cuda.mem_get_info(torch.device(place[1]))[0])
        available[place] = min(found)
    return available
