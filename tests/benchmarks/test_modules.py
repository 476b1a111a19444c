"""Every benchmark can be started: nothing it takes from the packages has gone."""

import importlib
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_imported(name: str) -> None:
    """Its names are those that the packages have, and it says what it is for."""
    assert importlib.import_module(f"benchmarks.{name}").__doc__
