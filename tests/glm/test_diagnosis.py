"""What people are told about the native CPU kernels: the reason and the remedy, or nothing where all is well."""

import pytest

from glm.kernels.diagnosis import NativeState, native_state
from glm.kernels.native import INSTRUCTION_SETS, best_kernels

COMPLAINTS = {
    "never built": (NativeState((), (), "AVX512"), "were not built, torch computes instead"),
    "built by an older glmpipe": (NativeState(INSTRUCTION_SETS, (), "AVX512"), "were built from other sources"),
    "built by an old compiler": (
        NativeState(("avx2", "portable"), ("avx2", "portable"), "AVX512"),
        "the CPU has AVX512, but its native kernels were not built",
    ),
    "an old CPU": (NativeState(INSTRUCTION_SETS, ("portable",), "DEFAULT"), "the CPU lacks AVX2"),
}


@pytest.mark.parametrize(("state", "words"), COMPLAINTS.values(), ids=COMPLAINTS)
def test_a_slower_way_than_possible_is_explained(state: NativeState, words: str) -> None:
    """One line with the reason, and what to do about it."""
    assert state.complaint is not None
    assert words in state.complaint
    assert "install" in state.complaint or "would be much faster" in state.complaint
    assert "\n" not in state.complaint


@pytest.mark.parametrize(
    "state",
    [
        NativeState(INSTRUCTION_SETS, INSTRUCTION_SETS, "AVX512"),
        NativeState(INSTRUCTION_SETS, ("avx2", "portable"), "AVX512"),  # the processor has no VNNI
        NativeState(INSTRUCTION_SETS, ("avx2", "portable"), "AVX2"),
        NativeState(("portable",), ("portable",), "DEFAULT"),  # of another architecture: nothing else to build
    ],
)
def test_nothing_is_said_where_nothing_can_be_done(state: NativeState) -> None:
    """The best kernels that the processor runs are in use."""
    assert state.complaint is None
    assert state.chosen == state.usable[0]


def test_the_state_is_that_of_the_kernels_in_use() -> None:
    """What is told is what computes."""
    kernels = best_kernels()
    assert native_state().chosen == (None if kernels is None else kernels.name)
