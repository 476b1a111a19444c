"""Who takes the layers of a stage that is gone: whole plans, neighbours first, within memory; said in words."""

import itertools
import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.errors import ReplanError
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.replanning import Remaining, Replanner, candidates, checked_hosts, moves
from glm.config import parse_config
from protocol.control import Join, Pong
from tests.tiny_checkpoints import CAUSAL

ENDS = EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32")
GB = 10**9
CONFIG = parse_config({**CAUSAL, "num_layers": 12, "hidden_size": 4096, "ffn_hidden_size": 13696, "kv_channels": 1024})
LAYER_BYTES = 4 * 4096 * (4096 + 2 * 2 * 1024 + 4096 + 3 * 13696)


def plan_of(*sizes: int, hosts: tuple[str | None, ...] = (), device: str = "cpu") -> Plan:
    borders = list(itertools.accumulate(sizes, initial=0))
    hosts = hosts or (None,) * len(sizes)
    pairs = zip(itertools.pairwise(borders), hosts, strict=True)
    return Plan(tuple(StagePlan(device, start, end, "fp32", host=host) for (start, end), host in pairs), ENDS)


def sizes(plan: Plan) -> list[int]:
    return [stage.layer_end - stage.layer_start for stage in plan.stages]


def remaining(index: int, host: str, free_bytes: int, device: str = "cuda:0", held_bytes: int = 0) -> Remaining:
    join = Join(
        1,
        f"stage-{index + 1}",
        "1",
        "2",
        host,
        7,
        device,
        "a device",
        free_bytes,
        free_bytes,
        1,
        (),
        "",
        "",
        False,
        None,
        None,
    )
    return Remaining(index, join, Pong(0, "serving", 1, 0.0, 0, 0, 0, held_bytes, held_bytes, 0, 0))


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.data())
def test_candidates_are_whole_plans_of_those_that_are_left(counts: list[int], data: st.DataObject) -> None:
    """Every layer once, in order; each stage keeps its first neighbours' layers at first; at least one candidate."""
    plan = plan_of(*counts)
    left = sorted(data.draw(st.sets(st.integers(0, len(counts) - 1), min_size=1, max_size=len(counts) - 1)))
    found = list(itertools.islice(candidates(plan, left), 50))
    assert found
    for candidate in found:
        borders = [(stage.layer_start, stage.layer_end) for stage in candidate.stages]
        assert len(borders) == len(left)
        assert borders[0][0] == 0 and borders[-1][1] == plan.num_layers
        assert all(before[1] == after[0] for before, after in itertools.pairwise(borders))
        assert all(start < end for start, end in borders)
    for stage, index in zip(found[0].stages, left, strict=True):
        was = plan.stages[index]
        assert stage.layer_start <= was.layer_start and was.layer_end <= stage.layer_end


def test_the_first_candidate_lets_nobody_grow_much_more_than_others() -> None:
    """Layers go to both neighbours in proportion to what they have, at an end to the only one."""
    assert sizes(next(candidates(plan_of(4, 4, 4), [0, 2]))) == [6, 6]
    assert sizes(next(candidates(plan_of(8, 3, 1), [0, 2]))) in ([10, 2], [11, 1])
    assert sizes(next(candidates(plan_of(4, 4, 4), [1, 2]))) == [8, 4]
    assert sizes(next(candidates(plan_of(2, 3, 3, 4), [0, 3]))) == [4, 8]


def test_memory_decides_between_the_neighbours() -> None:
    """The left one has room for a layer more, the right one for three: whatever else would be fair."""
    plan = plan_of(4, 4, 4, hosts=("a", "b", "c"), device="cuda:0")
    small, large = remaining(0, "a", int(5.9 * LAYER_BYTES)), remaining(2, "c", 40 * LAYER_BYTES)
    found = Replanner(CONFIG, 10, refuse=True)(plan, [small, large])
    assert sizes(found.plan)[0] == 5
    with pytest.raises(ReplanError, match=r"no room: cuda:0 of a has .* available, .* are needed"):
        Replanner(CONFIG, 10, refuse=True)(plan, [small, remaining(2, "c", 5 * LAYER_BYTES)])
    assert sizes(Replanner(CONFIG, 10, refuse=False)(plan, [small, small]).plan) == [6, 6]


def test_layers_move_on_where_the_neighbours_have_no_room() -> None:
    """The one behind the neighbour has all the room: the neighbour hands over as many as it takes."""
    plan = plan_of(3, 3, 3, 3, hosts=("a", "b", "c", "d"), device="cuda:0")
    others = [
        remaining(0, "a", int(4.9 * LAYER_BYTES)),
        remaining(1, "b", int(4.9 * LAYER_BYTES)),
        remaining(3, "d", int(4.9 * LAYER_BYTES)),
    ]
    found = Replanner(CONFIG, 10, refuse=True)(plan, others)
    assert sizes(found.plan) == [4, 4, 4]


def test_what_serving_workers_hold_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU little is free while they hold their layers, which they give back."""
    monkeypatch.setattr("coordinator.memory.host_memory", lambda: (64 * GB, 6 * LAYER_BYTES))
    plan, own = plan_of(4, 4, 4), platform.node() or "localhost"
    others = [remaining(i, own, 64 * GB, "cpu", held_bytes=4 * LAYER_BYTES) for i in (0, 2)]
    assert sizes(Replanner(CONFIG, 10, refuse=True)(plan, others).plan) == [6, 6]
    monkeypatch.setattr("coordinator.memory.host_memory", lambda: (64 * GB, 2 * LAYER_BYTES))
    with pytest.raises(ReplanError, match="no room"):
        Replanner(CONFIG, 10, refuse=True)(plan, others)


def test_nothing_left_is_said() -> None:
    with pytest.raises(ReplanError, match="no other stage is left"):
        Replanner(CONFIG, 10, refuse=True)(plan_of(4, 8), [])


def test_moves_are_told_in_users_words() -> None:
    """Layers from 1, stages from 1, hosts and devices; and which stages have another number."""
    old = plan_of(4, 4, 4, hosts=(None, "lab2", None))
    new = next(candidates(old, [0, 2]))
    assert moves(old, new, [0, 2]) == (
        "layers 5-6: from stage 2 (cpu of lab2, fp32) to stage 1 (cpu of this host, fp32)",
        "layers 7-8: from stage 2 (cpu of lab2, fp32) to stage 2 (cpu of this host, fp32)",
        "what was stage 3 is stage 2 now",
    )


def test_a_stage_that_others_cannot_reach_is_not_put_behind_them() -> None:
    """Whoever listens on this host alone stays behind this host's stages."""
    mixed = plan_of(4, 8, hosts=("lab2", None))
    with pytest.raises(ReplanError, match="stage 2 of this host would follow a stage of lab2"):
        checked_hosts(mixed, [])
    assert checked_hosts(mixed, [1]) == ("lab2", None)
    with pytest.raises(ReplanError, match="the coordinator would follow a stage of lab2"):
        checked_hosts(plan_of(12, hosts=("lab2",)), [])
