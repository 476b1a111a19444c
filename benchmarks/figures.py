"""Figures measured in several rounds, held against bounds: arithmetic, a table, JSON, and options that all share."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.comparison import spread


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of every round; its median is held against `least` or `most`, where one of them is given."""

    what: str
    unit: str
    values: tuple[float, ...]
    least: float | None = None
    most: float | None = None

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """None without a bound."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.median >= self.least) and (self.most is None or self.median <= self.most)

    @property
    def bound(self) -> str:
        """For people; empty without one."""
        given = (("at least", self.least), ("at most", self.most))
        return ", ".join(f"{word} {value:g}" for word, value in given if value is not None)


def over(what: str, above: Sequence[float], below: Sequence[float], **bounds: float) -> Figure:
    """The ratio of two figures that took turns, round by round: what disturbs a whole round cancels."""
    return Figure(what, "ratio", tuple(a / b for a, b in zip(above, below, strict=True)), **bounds)


def figure_table(figures: Sequence[Figure]) -> str:
    """Markdown; of several rounds the median, and the least and the most in parentheses."""
    lines = ["| what | measured | bound | |", "| --- | --- | --- | --- |"]
    for figure in figures:
        verdict = {None: "", True: "met", False: "missed"}[figure.is_met]
        lines.append(f"| {figure.what}, {figure.unit} | {spread(figure.values)} | {figure.bound} | {verdict} |")
    return "\n".join(lines)


def in_turns(sides: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Every side's value in every round; who begins changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(num_rounds):
        for name in order:
            found[name].append(sides[name]())
        order.append(order.pop(0))
    return found


def options_parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """With the options of all of these benchmarks: `--rounds` and `--json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure of every round")
    return parser


def publish(figures: Sequence[Figure], options: argparse.Namespace) -> None:
    """Print the table; write the JSON file that was asked for."""
    print(figure_table(figures))
    if options.json is not None:
        given = {name: value for name, value in vars(options).items() if name != "json"}
        found: dict[str, Any] = {"options": given, "figures": [as_json(figure) for figure in figures]}
        options.json.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def as_json(figure: Figure) -> dict[str, Any]:
    """Every value, and what follows from them."""
    return {**asdict(figure), "median": figure.median, "is_met": figure.is_met}


def say(line: str) -> None:
    """Tell the person who waits what is happening."""
    print(line, file=sys.stderr, flush=True)
