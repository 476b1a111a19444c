"""Fixtures of the coordinator's tests."""

from pathlib import Path

import pytest

from protocol.key_files import KeyDirectory


@pytest.fixture
def keys(tmp_path: Path) -> KeyDirectory:
    """A launching host's keys: its own, and nobody let in yet."""
    keys = KeyDirectory(tmp_path / "keys")
    keys.make_own()
    return keys
