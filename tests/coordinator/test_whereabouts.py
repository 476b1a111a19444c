"""Where a step is that does not come back, and when it can be known that none will."""

import pytest

from coordinator.whereabouts import IDLE_HEARTBEATS, IdleWatch, Place, locate
from protocol.control import Pong

NAMES, ENDS = ("stage 1", "stage 2"), ("tcp://a", "tcp://b", "tcp://c")


@pytest.mark.parametrize(
    ("num_sent", "num_back", "stages", "words"),
    [
        (5, 4, ((4, 4), (4, 4)), "between this host and stage 1: can tcp://a be reached from there?"),
        (5, 4, ((5, 4), (4, 4)), "in stage 1"),
        (5, 4, ((5, 5), (4, 4)), "between stage 1 and stage 2: can tcp://b be reached from there?"),
        (5, 4, ((5, 5), (5, 4)), "in stage 2"),
        (5, 4, ((5, 5), (5, 5)), "between stage 2 and this host: can tcp://c be reached from there?"),
        (7, 3, ((6, 5), (4, 3)), "in stage 2"),  # and stage 1 waits for it
        (7, 3, ((6, 5), (3, 3)), "between stage 1 and stage 2: can tcp://b be reached from there?"),
        (1, 0, ((0, 0), (0, 0)), "between this host and stage 1: can tcp://a be reached from there?"),
        (3, 3, ((3, 3), (3, 3)), "in stage 1"),  # nothing is known
    ],
)
def test_a_step_is_where_the_last_one_went_that_did_not_go_on(
    num_sent: int, num_back: int, stages: tuple[tuple[int, int], ...], words: str
) -> None:
    """A stage that has taken more than it has done has it; otherwise the hop behind which less has arrived."""
    assert locate(num_sent, num_back, stages).words(NAMES, ENDS) == words


def test_of_a_hop_the_stage_at_its_end_is_replaced() -> None:
    """Of the way back that is the last one, which begins it."""
    assert [Place(index, is_hop=True).suspect(3) for index in range(4)] == [0, 1, 2, 2]


def pong(taken: int, done: int, state: str = "serving", epoch: int = 1) -> Pong:
    return Pong(0, state, epoch, 0.0, done, 0, 0, 0, 0, taken, 0)  # type: ignore[arg-type]


def test_a_lost_step_is_noticed_when_all_are_idle() -> None:
    """After as many heartbeats of every stage; how often it is asked in between tells nothing."""
    watch = IdleWatch()
    assert not watch.look(5, 4, [pong(5, 5), pong(4, 4)])
    for _ in range(IDLE_HEARTBEATS - 1):
        pongs = [pong(5, 5), pong(4, 4)]
        assert not any(watch.look(5, 4, pongs) for _ in range(20))
    old, new = pongs[0], pong(4, 4)
    assert not watch.look(5, 4, [old, new])  # one has not said it again
    assert watch.look(5, 4, [pong(5, 5), new])


@pytest.mark.parametrize(
    ("num_sent", "num_back", "pongs"),
    [
        (5, 4, [pong(5, 4), pong(4, 4)]),
        (5, 4, [pong(5, 5), pong(5, 4)]),
        (5, 5, [pong(5, 5), pong(5, 5)]),
        (5, 4, [pong(5, 5), pong(4, 4, "loading")]),
    ],
    ids=["first busy", "second busy", "nothing under way", "loading"],
)
def test_no_step_is_lost_while_somebody_is_busy(num_sent: int, num_back: int, pongs: list[Pong]) -> None:
    """However long that takes: patience is for that."""
    watch = IdleWatch()
    for _ in range(3 * IDLE_HEARTBEATS):
        fresh = [pong(each.num_taken, each.num_steps, each.state) for each in pongs]
        assert not watch.look(num_sent, num_back, fresh)


def test_whatever_goes_on_begins_the_count_anew() -> None:
    """A step taken, an outcome, another step sent, another epoch."""
    for change in (
        (5, 4, [pong(5, 5), pong(5, 5)]),
        (6, 5, [pong(5, 5), pong(4, 4)]),
        (5, 4, [pong(1, 1, epoch=2)] * 2),
    ):
        watch = IdleWatch()
        for _ in range(IDLE_HEARTBEATS):
            assert not watch.look(5, 4, [pong(5, 5), pong(4, 4)])
        assert not watch.look(*change)
        for _ in range(IDLE_HEARTBEATS - 1):
            assert not watch.look(
                change[0], change[1], [pong(p.num_taken, p.num_steps, epoch=p.epoch) for p in change[2]]
            )
