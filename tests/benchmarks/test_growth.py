"""How time grows with work: the fitted line, the points of a real stack, the drawing."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import growth
from benchmarks.growth import CONTEXTS, SEQUENCES, Stack, figures, fit, panels
from benchmarks.plot import Panel, svg, ticks

# 20 ms, and 1 us for every cached token of every sequence.
POINTS = {(n, c): 0.02 + 1e-6 * n * c for n, c in itertools.product(SEQUENCES, CONTEXTS)}


def test_the_line_is_found_again() -> None:
    """Of eight sequences, a token more of each costs eight times that of one."""
    found = fit(POINTS, 8)
    assert (found.step_s, found.cached_token_s) == pytest.approx((0.02, 8e-6))


def test_the_slope_is_told_for_one_sequence_and_as_reading() -> None:
    """57344 bytes in 1 us are 57 GB/s."""
    told = {figure.what: figure.median for figure in figures({p: [s] for p, s in POINTS.items()}, 57344)}
    assert told["step of 4, a cached token of one sequence more"] == pytest.approx(1.0)
    assert told["step of 4, keys and values read"] == pytest.approx(57.344)
    assert told["step of 64, no context"] == pytest.approx(20.0)


def test_any_point_can_be_measured_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are set to a length, longer or shorter than before."""
    monkeypatch.setattr(growth, "MODEL", growth.MODEL.with_name("random:tiny"))
    monkeypatch.setattr(growth, "CONTEXTS", (4, 8))
    monkeypatch.setattr(growth, "SEQUENCES", (1, 2))
    stack = Stack("int8", 2)
    assert all(stack.step_s(point) > 0 for point in ((2, 8), (1, 4), (2, 4), (1, 8)))
    assert stack.kv_bytes_per_token == 2 * stack.layers.kv_bytes_per_token


def test_the_drawing_is_xml_with_a_curve_for_each_name() -> None:
    """Two panels, as many curves as there are numbers of sequences and contexts, nothing outside the picture."""
    root = ElementTree.fromstring(svg(panels(POINTS)))
    curves = [line for line in root.iter("{http://www.w3.org/2000/svg}polyline") if line.get("stroke-width") == "2"]
    assert len(curves) == len(SEQUENCES) + len(CONTEXTS)
    width, height = (float(root.get(name) or 0) for name in ("width", "height"))
    for line in curves:
        for point in (line.get("points") or "").split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    assert "a &lt; b" in svg([Panel("a < b", "x", "y", {"one": [(1, 1), (2, 2)]})])


def test_ticks_enclose_what_is_drawn() -> None:
    """At 1, 2 and 5."""
    assert ticks(3, 40) == [2, 5, 10, 20, 50]
    assert ticks(1, 10) == [1, 2, 5, 10]
