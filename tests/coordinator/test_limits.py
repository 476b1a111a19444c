"""How much may go through a plan at once: sizes in bytes become tokens, and the tightest limit is named."""

import argparse
from pathlib import Path

import pytest

from coordinator.commands.options import add_placement_options, plan_request
from coordinator.errors import PlanError
from coordinator.limits import ModelLimits, context_line, limits_of, longest_context, parse_bytes
from coordinator.memory_plan import memory_needs
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.plan_request import PlanRequest
from coordinator.planning import resolve
from glm.config import load_config
from tests.tiny_checkpoints import PREFIX, write_checkpoint

ENDS = EndsPlan("cpu", "fp32", "cpu", "cpu", "fp32")
TWO = (StagePlan("cpu", 0, 4, "fp32"), StagePlan("cpu", 4, 6, "fp32"))
LIMITS = ModelLimits(1024, lambda stage: 10 * (stage.layer_end - stage.layer_start), 100_000)


def request(*words: str) -> PlanRequest:

    parser = argparse.ArgumentParser()
    add_placement_options(parser)
    return plan_request(parser.parse_args(words))


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 * 1024**3),
        ("1.5 GB", 1_500_000_000),
        (" 300 mb ", 300_000_000),
        ("4096B", 4096),
        ("1TiB", 1024**4),
        ("3G", 3 * 10**9),
        ("2048", None),
        ("20", None),
        ("GiB", None),
        ("-1GB", None),
        ("1e9B", None),
        ("2 gigs", None),
    ],
)
def test_sizes_are_written_as_people_write_them(text: str, num_bytes: int | None) -> None:
    """Powers of 1000 and of 1024, always with a unit: a bare number may be meant as tokens."""
    assert parse_bytes(text) == num_bytes


def test_bytes_become_tokens_for_each_stages_own_layers() -> None:
    """Twice the layers, half the tokens; the options of a command reach the plan."""
    words = ("--layers", "cpu=1-4", "--layers", "cpu=5-6", "--kv-budget", "1kB")
    plan = resolve(request(*words, "--max-num-seqs", "3", "--max-model-len", "20"), 6, ("cpu",), limits=LIMITS)
    assert [stage.kv_budget_tokens for stage in plan.stages] == [25, 50]
    assert (plan.max_num_seqs, plan.max_model_len, plan.prefill_chunk) == (3, 20, 256)
    assert resolve(request("--prefill-chunk", "7"), 6, ("cpu",)).prefill_chunk == 7


def test_a_piece_of_a_prompt_must_fit_into_a_message() -> None:
    """The wider the hidden states, the fewer tokens one step carries."""
    limits = limits_of(load_config(Path("random:chatglm2-6b")))
    assert limits.max_step_tokens == 4096
    with pytest.raises(PlanError, match="must be from 1 to 4096, which one message carries"):
        resolve(request("--prefill-chunk", "5000"), 28, ("cpu",), limits=limits)


def test_a_tokens_bytes_follow_the_stages_layers_precision_and_device() -> None:
    """As its cache will hold them: 16 bits on a card, fp32 beside int4 weights on a CPU."""
    limits = limits_of(load_config(Path("random:chatglm2-6b")))
    assert limits.kv_bytes_per_token(StagePlan("cuda:0", 0, 28, "int4")) == 28 * 1024
    assert limits.kv_bytes_per_token(StagePlan("cpu", 0, 14, "int4")) == 28 * 1024
    assert limits.kv_bytes_per_token(StagePlan("cpu", 0, 14, "bf16")) == 14 * 1024


def test_all_faults_of_the_settings_are_told_at_once() -> None:
    """Beside those of the placement; a budget for all stages stated twice is one fault, not one for each."""
    words = ["--stages", "2", "--kv-budget", "1GB", "--kv-budget-tokens", "9", "--max-num-seqs", "0"]
    words += ["--max-model-len", "2000", "--prefill-chunk", "-1", "--lm-head", "tpu"]
    with pytest.raises(PlanError) as caught:
        resolve(request(*words), 6, ("cpu",), limits=LIMITS)
    assert len(caught.value.faults) == 5
    with pytest.raises(PlanError, match="--kv-budget 'x' is not a size") as caught:
        resolve(request("--layers", "cpu=1-9", "--kv-budget", "x"), 6, ("cpu",), limits=LIMITS)
    assert len(caught.value.faults) == 2


def test_the_longest_context_is_the_tightest_limit_and_says_which() -> None:
    """The model's own, the plan's, or that of a stage, by its number."""
    plan, capped = Plan(TWO, ENDS), Plan(TWO, ENDS, max_model_len=500)
    assert context_line(plan, 1024, (4096, 4096)) == "longest context: 1024 tokens, the model's own"
    assert "500 tokens, the plan's max_model_len (the model's own is 1024)" in context_line(capped, 1024, (800, 4096))
    line = context_line(capped, 1024, (800, 300))
    assert "300 tokens, the KV budget of stage 2 (cpu, layers 5-6); the model's own is 1024" in line
    assert longest_context(capped, 1024, (800, 300)) == 300


def test_a_prompts_pieces_set_the_memory_to_compute(tmp_path: Path) -> None:
    """A longer piece takes more; of a prefix LM, whose prompts stay whole, the longest context does."""
    causal = load_config(Path("random:tiny"))
    write_checkpoint(tmp_path, PREFIX)
    prefix = load_config(tmp_path)

    def work_bytes(config: object, **settings: int) -> int:
        return memory_needs(Plan(TWO, ENDS, **settings), config, ["a", "a"], "a")[0].work_bytes  # type: ignore[arg-type]

    assert work_bytes(causal, prefill_chunk=64) < work_bytes(causal) < work_bytes(causal, prefill_chunk=512)
    few = {"prefill_chunk": 2, "max_num_seqs": 2}
    assert work_bytes(prefix, max_model_len=2, **few) < work_bytes(prefix, **few) == work_bytes(prefix, prefill_chunk=4)
    assert work_bytes(causal, max_num_seqs=300) > work_bytes(causal)
