"""Workers that are killed at every precision: what is fed again, beside others, is the same to the last bit."""

import signal
from collections.abc import Iterator

import pytest

from coordinator.plan_request import Option, PlanRequest
from glm.kernels.native import best_kernels
from tests.end_to_end.faults import DECODE, FOUR, NUM_STAGES, PHASES, Launch, Phase, disturbed_launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(best_kernels() is None, reason="without native kernels torch's sums depend on company"),
]

# Whole groups of int4; three steps to a prompt of 200 tokens, which on the way back hold the answers of others, too.
SHAPE = {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 96}
CHUNK = 90


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def launch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """One for all faults at a precision (fp32 has all of `test_faults_killed.py`, `test_faults_stalled.py`, ...)."""
    plan = PlanRequest(
        num_stages=NUM_STAGES, num_threads=1, prefill_chunk=CHUNK, cpu_precision=Option("the test", request.param)
    )
    with disturbed_launch(tmp_path_factory.mktemp("launch"), plan=plan, shape=SHAPE) as launch:
        yield launch


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_a_killed_worker_changes_no_token(launch: Launch, phase: Phase) -> None:
    """SIGKILL while prompts are fed, while tokens come one by one, and while drafts are verified: a stage for each."""
    launch.must_survive(phase, FOUR, launch.hit(signal.SIGKILL, PHASES.index(phase)))


def test_company_changes_no_token(launch: Launch) -> None:
    """Of four at once, greedy and seeded, each gets what it gets alone."""
    together = launch.wanted(DECODE, FOUR)
    for number, seed in enumerate(FOUR):
        [alone] = launch.answers(DECODE, (seed,), first=number)
        assert alone.close()[1].token_ids == together[number]
