"""Fixtures of tests with real processes."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.faults import Launch, disturbed_launch


@pytest.fixture(scope="module", autouse=True)
def _patience() -> Iterator[None]:
    """A healthy worker is not missed, however busy this machine is. Tests of silence set a limit of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coordinator.roster.SILENCE_LIMIT_S", 120.0)
        patch.setattr("coordinator.roster.LOADING_SILENCE_LIMIT_S", 120.0)
        yield


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """One for all faults of a module: each finds it as the recovery before left it."""
    with disturbed_launch(tmp_path_factory.mktemp("launch")) as launch:
        yield launch
