"""What a stage says of a step counts as far as it can be: no stamp, count or order of a liar gets any further."""

import pytest

from coordinator.stamps import believable
from protocol.data import StageTiming

HOSTS = (None, "lab2", "lab2", None)
TOLD = (
    StageTiming(0, 10.5, 0.25, 11.0, 40),
    StageTiming(1, 7000.0, 0.5, 7000.75, 41),
    StageTiming(2, 7001.0, 0.5, 7001.5, 42),
    StageTiming(3, 14.0, 0.5, 14.75, 43),
)
MOST = 100


def believed(timings: tuple[StageTiming, ...]) -> tuple[StageTiming, ...] | None:
    return believable(timings, HOSTS, MOST, 10.0, 15.0)


def test_what_can_be_is_taken_as_it_is() -> None:
    """Whatever the other host's clock says."""
    assert believed(TOLD) == TOLD


@pytest.mark.parametrize("stage_index", [0, 1, 4, 1_000_000])
def test_timings_of_other_stages_than_there_are_are_none(stage_index: int) -> None:
    """One too few, one too many, another order, a stage that does not exist."""
    assert believed(TOLD[:3]) is None
    assert believed((*TOLD, StageTiming(4, 14.0, 0.5, 14.75, 43))) is None
    assert believed((*TOLD[:3], StageTiming(stage_index, 14.0, 0.5, 14.75, 43))) is None


@pytest.mark.parametrize("number", [0.0, 1e-9, 1e6, 1e12])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("place", range(3))
def test_no_time_is_longer_than_the_step_was_under_way(stage: int, place: int, number: float) -> None:
    """Stays and hops of one clock are between nothing and all of it, computing no longer than the stay."""
    told = list(TOLD)
    fields = [told[stage].received_at_s, told[stage].compute_s, told[stage].sent_at_s]
    fields[place] = number
    told[stage] = StageTiming(stage, *fields, 40)  # type: ignore[arg-type]
    kept = believed(tuple(told))
    assert kept is not None
    assert all(0.0 <= t.compute_s <= t.sent_at_s - t.received_at_s <= 5.0 for t in kept)
    assert 0.0 <= kept[2].received_at_s - kept[1].sent_at_s <= 5.0
    assert 10.0 <= kept[0].received_at_s <= 15.0 and 10.0 <= kept[3].received_at_s <= 15.0


def test_no_stage_holds_more_than_it_may() -> None:
    """A count of KV tokens beyond the budget is the budget."""
    (kept, *_) = believed((StageTiming(0, 10.5, 0.25, 11.0, 2**62), *TOLD[1:])) or ()
    assert kept.kv_tokens == MOST
