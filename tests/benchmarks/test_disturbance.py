"""What other processes took: read from the kernel's counters, children excepted."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import disturbance as module
from benchmarks.disturbance import disturbance, machine_busy_s, process_s


def test_counters_are_read_from_the_right_columns() -> None:
    """A command's name may hold spaces and parentheses."""
    assert machine_busy_s("cpu  100 20 30 4000 5 6 7\ncpu0 1 2 3") == pytest.approx(1.5)
    stat = "42 (a (b) c) S 7 42 42 0 -1 4194560 1 2 3 4 100 50 30 20 20 0 5 0 9"
    assert process_s(stat) == (7, pytest.approx(2.0))


def test_own_children_disturb_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a million seconds that the machine was busy, the half that a child of ours had is not others'."""
    child, ticks = tmp_path / "42", round(1e6 / module._TICK_S)
    child.mkdir()

    def at(machine: int, own: int) -> None:
        (tmp_path / "stat").write_text(f"cpu  {machine} 0 0 0\n")
        (child / "stat").write_text(f"42 (worker) S {os.getpid()} {'0 ' * 9} {own} 0 0 0 20")

    monkeypatch.setattr(module, "PROC", tmp_path)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=iter((0.0, 1000.0)).__next__))
    at(machine=0, own=0)
    with disturbance() as others:
        at(machine=ticks, own=ticks // 2)
    assert others.cores == pytest.approx(500, rel=1e-3)


def test_a_system_that_does_not_tell_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no figure then."""
    monkeypatch.setattr(module, "PROC", tmp_path)
    with disturbance() as others:
        pass
    assert others.cores is None
