"""What `launch` in Python may be given for a plan, made a wish that can be checked."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coordinator.errors import PlanError, UsageError
from coordinator.plan import Plan
from coordinator.plan_file import plan_request_of, read_plan_file
from coordinator.plan_request import PlanRequest, StageRequest
from coordinator.planning import PlanSource


def stages_from(texts: Iterable[str], option: str) -> tuple[tuple[StageRequest, ...], list[str]]:
    """Stages written as `cuda:1=1-12` or `lab2/cuda:0=13-28`, and the faults of those that are not; see `option`."""
    stages, faults = [], []
    for text in texts:
        place, equals, layers = text.partition("=")
        host, slash, device = place.rpartition("/")
        if equals:
            stages.append(StageRequest(f"{option} {text}", device, layers, host=host if slash else None))
        else:
            faults.append(f"{option} {text}: no '='; write DEVICE=LAYERS, such as cuda:1=1-12 or cpu=all")
    return tuple(stages), faults


def wanted_plan(
    plan: PlanSource | Mapping[str, Any], layers: Mapping[str, str] | Iterable[str] | None, stages: int | None
) -> PlanSource:
    """The wish that one of the three is.

    Raises:
        UsageError: more than one is given, or something that none of them can be. PlanError: a dict has faults.
    """
    given = [name for name, value in (("plan", plan), ("layers", layers), ("stages", stages)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are given; one says where the layers go: drop the others")
    if layers is not None:
        return _of_layers(layers)
    if stages is not None:
        if isinstance(stages, bool) or not isinstance(stages, int):
            raise UsageError(f"stages is {stages!r}; it must be a number of stages, such as 2")
        return PlanRequest(num_stages=stages)
    if isinstance(plan, Mapping):
        return plan_request_of(plan)
    if not isinstance(plan, Plan | PlanRequest | str | Path | None):
        raise UsageError(f"plan is a {type(plan).__name__}; it must be a plan file, or a dict as such a file holds")
    return read_plan_file(Path(plan)) if isinstance(plan, str | Path) else plan


def _of_layers(layers: Mapping[str, str] | Iterable[str]) -> PlanRequest:
    if isinstance(layers, Mapping):
        layers = [f"{place}={which}" for place, which in layers.items()]
    texts = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f'layers is {layers!r}; it must be a list such as ["cuda:0=1-16", "cpu=17-28"], or a dict')
    stages, faults = stages_from(map(str, texts), "layers")
    if not texts:
        raise PlanError(["layers is empty: leave it out, or name a device"])
    return replace(PlanRequest(stages=stages), faults=tuple(faults), is_complete=not faults)
