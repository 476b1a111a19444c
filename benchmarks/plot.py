"""Curves over doublings, as an SVG file that any browser shows: both axes are logarithmic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 96, 40, 48
COLOURS = ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves by name, in the order in which they are coloured; all values above 0."""

    title: str
    x_label: str
    y_label: str
    curves: Mapping[str, Points]


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side."""
    size = f'width="{WIDTH * len(panels)}" height="{HEIGHT}" viewBox="0 0 {WIDTH * len(panels)} {HEIGHT}"'
    drawn = (f'<g transform="translate({WIDTH * n} 0)">{_panel(panel)}</g>' for n, panel in enumerate(panels))
    style = 'font-family="sans-serif" font-size="11" fill="#222"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(drawn)}</svg>\n'


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last one not above `low` to the first one not below `high`."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    first = max(i for i, step in enumerate(steps) if step <= low)
    last = min(i for i, step in enumerate(steps) if step >= high)
    return steps[first : last + 1]


def _panel(panel: Panel) -> str:
    points = [point for curve in panel.curves.values() for point in curve]
    columns = sorted({x for x, _ in points})
    rows = ticks(min(y for _, y in points), max(y for _, y in points))

    def across(x: float) -> float:
        return _place(x, columns[0], columns[-1], LEFT, WIDTH - RIGHT)

    def down(y: float) -> float:
        return _place(y, rows[0], rows[-1], HEIGHT - BOTTOM, TOP)

    parts = [_text(LEFT, TOP - 18, panel.title, 'font-size="13" font-weight="bold"')]
    parts += [_line([(across(x), TOP), (across(x), HEIGHT - BOTTOM)], "#ddd") for x in columns]
    parts += [_line([(LEFT, down(y)), (WIDTH - RIGHT, down(y))], "#ddd") for y in rows]
    parts += [_text(across(x), HEIGHT - BOTTOM + 15, f"{x:g}", 'text-anchor="middle"') for x in columns]
    parts += [_text(LEFT - 6, down(y) + 4, f"{y:g}", 'text-anchor="end"') for y in rows]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, panel.x_label, 'text-anchor="middle"'))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(_text(14, middle, panel.y_label, f'text-anchor="middle" transform="rotate(-90 14 {middle:g})"'))
    for index, (name, curve) in enumerate(panel.curves.items()):
        colour = COLOURS[index * (len(COLOURS) - 1) // max(1, len(panel.curves) - 1)]
        drawn = [(across(x), down(y)) for x, y in curve]
        parts.append(_line(drawn, colour, width=2))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in drawn]
        parts.append(_text(WIDTH - RIGHT + 8, drawn[-1][1] + 4, name, f'fill="{colour}"'))
    return "".join(parts)


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (end - start) * math.log(value / low) / math.log(high / low)


def _line(points: Points, colour: str, width: int = 1) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'
