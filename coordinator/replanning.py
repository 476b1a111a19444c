"""Where the layers of a stage go that is gone for good: pure decisions, from what the others have room for."""

import itertools
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from coordinator.door import behind_others
from coordinator.errors import ReplanError
from coordinator.limits import longest_context
from coordinator.memory import available_again
from coordinator.memory_plan import Place, judge, memory_needs
from coordinator.plan import Plan, StagePlan, layers_text
from glm.config import ModelConfig
from glm.cost import kv_bytes_per_token
from glm.precision import Precision
from protocol.control import Join, Pong

MOST_NEIGHBOURLY = 200
"""Ways of sharing among neighbours that are tried before all stages share anew."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """A stage that lives: its index in the plan as it was, what its worker said of itself, and its latest report."""

    index: int
    join: Join
    pong: Pong | None


@dataclass(frozen=True, slots=True)
class Replanned:
    """`plan` has one stage for each of those that remained, in their order; `lines` say what went where.

    `kv_tokens` is the budget of stages that state none themselves.
    """

    plan: Plan
    kv_tokens: int
    lines: tuple[str, ...]


class Replanner:
    """Decides for one model. `most_kv_tokens` as for `fitting_kv_budget`; without `refuse`, memory is not asked."""

    def __init__(self, config: ModelConfig, most_kv_tokens: int, *, refuse: bool) -> None:
        self._config = config
        self._most_kv_tokens = most_kv_tokens
        self._refuse = refuse

    def __call__(self, plan: Plan, remaining: Sequence[Remaining]) -> Replanned:
        """The first plan that fits, those first that move the fewest layers.

        Raises:
            ReplanError: nothing is left, or nothing fits.
        """
        if not remaining:
            raise ReplanError("no other stage is left")
        own_host, hosts = platform.node() or "localhost", [each.join.host for each in remaining]
        left = [each.index for each in remaining]
        shortages: tuple[str, ...] = ()
        for candidate in candidates(plan, left):
            needs = memory_needs(candidate, self._config, hosts, own_host)
            available = available_again(needs, [each.join for each in remaining], own_host, self._held(plan, remaining))
            context = longest_context(candidate, self._config.max_context)
            verdict = judge(needs, available, self._most_kv_tokens, context)
            if not verdict.shortages or not self._refuse:
                return Replanned(candidate, verdict.kv_tokens, moves(plan, candidate, left))
            shortages = shortages or verdict.shortages
        raise ReplanError(f"the other stages have no room: {'. '.join(shortages)}")

    def _held(self, plan: Plan, remaining: Sequence[Remaining]) -> Mapping[Place, int]:
        """What the remaining stages have of each place, and will give back."""
        held: dict[Place, int] = {}
        for each in remaining:
            stage, place = plan.stages[each.index], (each.join.host, each.join.device)
            if each.pong is not None:
                layers, device_type = stage.layer_end - stage.layer_start, stage.device.partition(":")[0]
                rate = kv_bytes_per_token(self._config, layers, Precision(stage.precision), device_type)
                held[place] = held.get(place, 0) + each.pong.weight_bytes + each.pong.kv_tokens * rate
        return held


def checked_hosts(plan: Plan, listening: Collection[int]) -> tuple[str | None, ...]:
    """The hosts of a plan's stages, if those that follow another host's are among the ones that listen to others.

    The number behind the last stage stands for the coordinator. Raises ReplanError.
    """
    hosts = tuple(stage.host for stage in plan.stages)
    for number in behind_others(hosts):
        if number not in listening:
            who = "the coordinator" if number == len(hosts) else f"stage {number + 1} of this host"
            raise ReplanError(f"{who} would follow a stage of {hosts[number - 1]}, and does not listen to other hosts")
    return hosts


def candidates(plan: Plan, left: Sequence[int]) -> Iterator[Plan]:
    """Plans of the stages with these indices alone: what is missing goes to the neighbours, then to all of them.

    First those in which no stage grows much more than others, which is all that is known of their speed.
    """
    stages = [plan.stages[index] for index in left]
    shares = [_shares(before, after, plan.num_layers) for before, after in itertools.pairwise([None, *stages, None])]
    for borders in itertools.islice(itertools.product(*shares), MOST_NEIGHBOURLY):
        yield _with_borders(plan, stages, borders)
    weights = [stage.layer_end - stage.layer_start for stage in stages]
    if plan.num_layers >= len(stages):
        yield _with_borders(plan, stages, _in_proportion(plan.num_layers, weights))


def moves(old: Plan, new: Plan, left: Sequence[int]) -> tuple[str, ...]:
    """A line for every run of layers that has another place now, and for every stage that has another number."""
    lines = []
    before = [number for number, stage in enumerate(old.stages) for _ in range(stage.layer_start, stage.layer_end)]
    after = [number for number, stage in enumerate(new.stages) for _ in range(stage.layer_start, stage.layer_end)]
    ways = [(was, now) for was, now in zip(before, after, strict=True)]
    start = 0
    for (was, now), run in itertools.groupby(ways):
        end = start + len(list(run))
        if left[now] != was:
            lines.append(f"layers {layers_text(start, end)}: from {_title(old, was)} to {_title(new, now)}")
        start = end
    renamed = [(index, number) for number, index in enumerate(left) if index != number]
    lines += [f"what was stage {index + 1} is stage {number + 1} now" for index, number in renamed]
    return tuple(lines)


def _shares(before: StagePlan | None, after: StagePlan | None, num_layers: int) -> list[int]:
    """Where the border between two neighbours may lie, the fairest place first; at the ends there is no choice."""
    if before is None or after is None:
        return [0 if before is None else num_layers]
    start, end = before.layer_end, after.layer_start

    def growth(border: int) -> float:
        sizes = (start - before.layer_start, after.layer_end - end)
        return max((border - start) / sizes[0], (end - border) / sizes[1])

    return sorted(range(start, end + 1), key=growth)


def _in_proportion(num_layers: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Borders between stages that get layers by their weights, each at least one."""
    borders = [0]
    for number in range(1, len(weights)):
        border = round(num_layers * sum(weights[:number]) / sum(weights))
        borders.append(min(max(border, borders[-1] + 1), num_layers - (len(weights) - number)))
    return (*borders, num_layers)


def _with_borders(plan: Plan, stages: Sequence[StagePlan], borders: Sequence[int]) -> Plan:
    ranges = zip(stages, itertools.pairwise(borders), strict=True)
    return replace(plan, stages=tuple(replace(s, layer_start=start, layer_end=end) for s, (start, end) in ranges))


def _title(plan: Plan, index: int) -> str:
    stage = plan.stages[index]
    return f"stage {index + 1} ({stage.device} of {stage.host or 'this host'}, {stage.precision})"
