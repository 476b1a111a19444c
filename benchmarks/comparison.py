"""A table of measured figures beside another program's and beside targets: pure arithmetic and text."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure, measured in several rounds; `theirs` holds the other program's in the same rounds, or nothing.

    `target` is the least ratio to theirs or, where they have none, the least figure of ours.
    """

    precision: str
    what: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    target: float | None = None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours over theirs, round by round: what disturbs a whole round cancels."""
        return tuple(our / their for our, their in zip(self.ours, self.theirs, strict=False) if their)

    @property
    def achieved(self) -> float | None:
        """What the target is held against; None where there is none of it."""
        own = self.ours if self.unit == "share" else ()
        values = self.ratios if self.theirs else own
        return statistics.median(values) if values else None

    @property
    def is_met(self) -> bool | None:
        """None without a target, or without the other program."""
        return None if self.target is None or self.achieved is None else self.achieved >= self.target

    def as_json(self) -> dict[str, Any]:
        """Every figure of every round, and what follows from them."""
        return {
            "precision": self.precision,
            "what": self.what,
            "unit": self.unit,
            "ours": list(self.ours),
            "theirs": list(self.theirs),
            "ratios": list(self.ratios),
            "target": self.target,
            "achieved": self.achieved,
            "is_met": self.is_met,
        }


def table(comparisons: Sequence[Comparison], their_name: str) -> str:
    """Markdown; of several rounds the median, and the least and the most in parentheses."""
    lines = [
        f"| precision | what | ours | {their_name} | ratio | target | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in comparisons:
        target = "" if row.target is None else f"{row.target:g}"
        verdict = {None: "", True: "met", False: "short"}[row.is_met]
        cells = (spread(row.ours), spread(row.theirs), spread(row.ratios), target, verdict)
        lines.append(f"| {row.precision} | {row.what}, {row.unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """`median (least - most)`; only the value if there is one, nothing if there is none."""
    if len(values) < 2:
        return "".join(map(_number, values))
    return f"{_number(statistics.median(values))} ({_number(min(values))} - {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
