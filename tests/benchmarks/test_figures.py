"""Figures held against bounds, and turns: what the benchmarks of several rounds share."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.figures import Figure, figure_table, in_turns, over, publish


def test_the_median_of_the_rounds_is_held_against_the_bound() -> None:
    """One bad round of three changes no verdict; without a bound there is none."""
    assert Figure("hop", "us", (90.0, 900.0, 100.0), most=150).is_met is True
    assert Figure("hop", "us", (190.0, 90.0, 180.0), most=150).is_met is False
    assert Figure("speed", "ratio", (0.96, 0.98, 0.5), least=0.97).is_met is False
    assert Figure("hop", "us", (1.0,)).is_met is None


def test_ratios_are_those_of_one_round() -> None:
    """A round in which everything took twice as long changes nothing."""
    assert over("a over b", (2.0, 4.0), (1.0, 2.0), least=1.5) == Figure("a over b", "ratio", (2.0, 2.0), least=1.5)


def test_sides_take_turns_and_take_turns_in_beginning() -> None:
    """Each runs once a round; who went first goes last in the next one."""
    said: list[str] = []

    def side(name: str) -> float:
        said.append(name)
        return float(len(said))

    found = in_turns({"a": lambda: side("a"), "b": lambda: side("b")}, 3)
    assert said == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}


def test_the_table_has_bounds_beside_figures_and_the_file_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a reader needs to judge: the figure, its spread, the bound, whether it holds."""
    figures = [Figure("hop", "us", (100.0, 90.0, 95.0), most=150), Figure("lap", "us", (400.0,))]
    assert figure_table(figures).splitlines()[2:] == [
        "| hop, us | 95.0 (90.0 - 100.0) | at most 150 | met |",
        "| lap, us | 400.0 |  |  |",
    ]
    path = tmp_path / "found.json"
    publish(figures, argparse.Namespace(rounds=3, json=path))
    assert "at most 150" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["options"] == {"rounds": 3}
    assert written["figures"][0]["values"] == [100.0, 90.0, 95.0]
    assert (written["figures"][0]["median"], written["figures"][0]["is_met"]) == (95.0, True)
