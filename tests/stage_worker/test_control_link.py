"""The control thread's decisions, taken without the thread: what a main thread that takes nothing leads to."""

import logging
import os
import threading
from collections.abc import Iterator

import pytest
import zmq

from protocol.control import Assign, Join, Welcome
from protocol.security import new_key_pair
from protocol.sockets import Socket
from stage_worker import control_link
from stage_worker.control_link import TAKEN_AFTER_S, ControlLink, CoordinatorLost, LinkSettings
from stage_worker.exits import EXIT_LOST

ASSIGN = Assign(3, 1, 0, 1, "", None, "", 0, 2, "fp32", 100, "ipc:///x", None, None, None, False)


def no_join() -> Join:
    raise AssertionError("nobody asks who this is")


@pytest.fixture
def ended() -> threading.Event:
    """Set when the control thread ends the process."""
    return threading.Event()


@pytest.fixture
def link(ended: threading.Event) -> Iterator[ControlLink]:
    """Of a worker of another host than the coordinator's; its thread does not run, nothing is connected."""
    context: zmq.Context[Socket] = zmq.Context()
    read_end, write_end = os.pipe()
    keys = new_key_pair()
    settings = LinkSettings("tcp://192.0.2.1:7410", "cpu-1", no_join, None, read_end, None, lambda: keys, keys.public)
    link = ControlLink(context, settings, lambda *_: ASSIGN, lambda: None, lambda _: ended.set(), "inproc://wake")
    try:
        yield link
    finally:
        link.close()
        context.term()
        os.close(read_end)
        os.close(write_end)


def test_the_same_assignment_counts_again_after_a_loss(link: ControlLink) -> None:
    """Asked again while it loads, it is on its way; once the coordinator was lost, nothing is."""
    link._hand_over(ASSIGN)
    link._hand_over(ASSIGN)
    link._lose_coordinator("it has missed this worker")
    link._hand_over(ASSIGN)
    assert [link.take_command() for _ in range(4)] == [ASSIGN, CoordinatorLost(), ASSIGN, None]


def test_a_goodbye_is_no_loss(link: ControlLink, caplog: pytest.LogCaptureFixture) -> None:
    """Weights are kept and the next coordinator is waited for; nothing is said of silence, and nothing warned of."""
    link._on_welcome(Welcome(1, "launch-1", 1.0, 20.0, False))
    with caplog.at_level(logging.INFO):
        link._on_farewell("the launch has ended")
    link._count_silence(False, 1000.0)
    assert link.take_command() == CoordinatorLost() and not link.leaving
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.INFO, "launch-1 says goodbye: the launch has ended; keeping the weights for the next one")
    ]


def test_a_worker_whose_main_thread_hangs_leaves(link: ControlLink) -> None:
    """Its place is another's, or its own again after a restart; until then it has had time to finish its work."""
    link._lose_coordinator("it has missed this worker")
    link._count_untaken(TAKEN_AFTER_S - 1)
    assert not link.leaving
    link._count_untaken(1)
    assert link.leaving and link.exit_code == EXIT_LOST


def test_a_main_thread_that_hangs_is_not_waited_for(
    link: ControlLink, ended: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control thread notices by itself, and ends the process that nobody else would end."""
    monkeypatch.setattr(control_link, "TAKEN_AFTER_S", 0.1)
    monkeypatch.setattr(control_link, "STUCK_AFTER_S", 0.1)
    link._hand_over(ASSIGN)
    link.start()
    assert ended.wait(30) and link.exit_code == EXIT_LOST


def test_a_main_thread_that_takes_one_thing_after_another_is_no_reason_to_leave(link: ControlLink) -> None:
    """However many wait: each that was taken is a sign of life; with nothing left no waiting counts."""
    link._hand_over(ASSIGN)
    link._lose_coordinator("it has missed this worker")
    for _ in range(2):
        link._count_untaken(TAKEN_AFTER_S - 1)
        assert link.take_command() is not None
        link._count_untaken(TAKEN_AFTER_S - 1)
    link._count_untaken(2 * TAKEN_AFTER_S)
    assert not link.leaving
