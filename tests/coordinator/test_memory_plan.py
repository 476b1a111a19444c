"""The memory check: what a plan needs, per device, and what is said where it does not fit."""

import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coordinator import memory
from coordinator.chat_model import launch
from coordinator.cli import main
from coordinator.errors import NotEnoughMemory
from coordinator.limits import LEAST_KV_TOKENS, default_kv_tokens
from coordinator.memory import fitting_kv_budget
from coordinator.memory_plan import PROCESS_BYTES, Need, judge, memory_needs
from coordinator.plan import EndsPlan, Plan, StagePlan
from coordinator.plan_request import PlanRequest
from coordinator.planning import plan_for
from glm.config import ModelConfig, load_config
from glm.ends import Embedding, Head, end_placement
from glm.model import LayerStack
from glm.model_source import open_checkpoint
from glm.precision import Precision
from protocol.control import Join
from tests.tiny_checkpoints import PREFIX, write_checkpoint

GB = 10**9
HERE = platform.node()
SIX_B = Path("random:chatglm2-6b")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_config(SIX_B)


def join(device: str = "cpu", free: float = 16, host: str = HERE) -> Join:
    free_bytes = int(free * GB)
    return Join(
        1,
        "w",
        "0",
        "0",
        host,
        1,
        device,
        "x",
        2 * free_bytes,
        free_bytes,
        1,
        ("torch",),
        "ipc:///x",
        "key",
        False,
        None,
        None,
    )


def plan(*stages: tuple[str, int, int, str], budget: int | None = None, head: str = "int8") -> Plan:
    ends = EndsPlan("cpu", "fp32", "cpu", "cpu", head)
    return Plan(tuple(StagePlan(d, a, b, p, None, budget) for d, a, b, p in stages), ends)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_needs_are_what_loading_takes(precision: str) -> None:
    """Weights of layers and ends and KV bytes a token, held against a model that was loaded."""
    where = Path("random:tiny")
    config, checkpoint = load_config(where), open_checkpoint(where)
    stage, table, head = memory_needs(plan(("cpu", 1, 4, precision)), config, [HERE], HERE)
    stack = LayerStack.load(checkpoint, config, 1, 4, Precision(precision), CPU)
    vectors = 3 * (2 * config.hidden_size + config.qkv_size) * 4
    assert stack.weight_bytes <= stage.weight_bytes <= stack.weight_bytes + vectors
    assert stage.kv_bytes_per_token == stack.kv_bytes_per_token
    ends, lm_head = (end_placement(Precision(p), CPU, config) for p in ("fp32", "int8"))
    assert table.weight_bytes == Embedding.load(checkpoint, config, ends, lm_head).num_bytes
    assert head.weight_bytes == Head.load(checkpoint, config, ends, lm_head).num_bytes


def test_the_6b_shape_needs_what_the_readme_says(config: ModelConfig) -> None:
    """GB of 28 layers at each precision, on a CPU; fp16 caches on a GPU are half as large."""
    sizes = {}
    for precision in ("bf16", "int8", "int4"):
        need = memory_needs(plan(("cpu", 0, 28, precision)), config, [HERE], HERE)[0]
        sizes[precision] = round(need.weight_bytes / GB, 1)
        assert need.work_bytes > PROCESS_BYTES
    assert sizes == {"bf16": 11.4, "int8": 5.7, "int4": 3.2}
    on_gpu = memory_needs(plan(("cuda:0", 0, 28, "int4")), config, [HERE], HERE)[0]
    assert on_gpu.kv_bytes_per_token == 28 * 1024


def test_a_tied_table_counts_once(tmp_path: Path) -> None:
    """Where both ends hold it in the same way."""
    config = write_checkpoint(tmp_path, PREFIX)
    assert config.tied_ends
    shared = replace(plan(("cpu", 0, 3, "fp32")).ends, lm_head_precision="fp32")
    table, head = memory_needs(Plan((StagePlan("cpu", 0, 3, "fp32"),), shared), config, [HERE], HERE)[1:]
    assert (table.weight_bytes, head.weight_bytes) == (0, 4 * config.vocab_size * config.hidden_size)


def test_stages_of_one_host_share_its_memory(config: ModelConfig) -> None:
    """Two stages that would each fit alone do not fit together; on two hosts they do."""
    halves = plan(("cpu", 0, 14, "bf16"), ("cpu", 14, 28, "bf16"))
    with pytest.raises(NotEnoughMemory, match=r"cpu of .* has 10\.0 GB available, 1[23]\.\d GB are needed"):
        fitting_kv_budget(halves, config, [join(free=10), join(free=10)], 10**5)
    assert fitting_kv_budget(halves, config, [join(free=10), join(free=10, host="there")], 10**5) > LEAST_KV_TOKENS


def test_the_refusal_names_parts_numbers_and_remedies(config: ModelConfig) -> None:
    """Each part's weights and cache, what there is, and the precision at which it would fit."""
    with pytest.raises(NotEnoughMemory) as caught:
        fitting_kv_budget(plan(("cpu", 0, 28, "bf16")), config, [join(free=8)], 10**5)
    text = str(caught.value)
    assert "stage 1 (layers 1-28, bf16) 11.4 GB of weights, 58.7 MB of KV cache for 2048 tokens" in text
    assert "embeddings (fp32) 532.7 MB of weights" in text
    assert "all of it would fit in int8" in text
    assert "--kv-budget-tokens" in text
    assert "--no-memory-check" in text
    with pytest.raises(NotEnoughMemory, match="would fit in int4"):
        fitting_kv_budget(plan(("cpu", 0, 28, "int8")), config, [join(free=5)], 10**5)
    with pytest.raises(NotEnoughMemory, match="no precision would make it fit"):
        fitting_kv_budget(plan(("cpu", 0, 28, "int8")), config, [join(free=2)], 10**5)


def test_the_precision_that_would_fit_is_judged_by_the_plans_own_context(config: ModelConfig) -> None:
    """Where 100 tokens are all that a request may have, nobody needs room for 2048 of them."""
    short = replace(plan(("cpu", 0, 28, "bf16")), max_model_len=100)
    need = sum(
        n.num_bytes(100)
        for n in memory_needs(replace(short, stages=plan(("cpu", 0, 28, "int8")).stages), config, [HERE], HERE)
    )
    free = (need + 10**7) / GB
    with pytest.raises(NotEnoughMemory, match="would fit in int8"):
        fitting_kv_budget(short, config, [join(free=free)], 10**5)
    with pytest.raises(NotEnoughMemory, match="would fit in int4"):
        fitting_kv_budget(replace(short, max_model_len=None), config, [join(free=free)], 10**5)


def test_the_default_budget_counts_the_contexts_that_the_plan_allows() -> None:
    """Four of them, of the model's own or the plan's shorter ones, but not so little that short requests wait."""
    whole = plan(("cpu", 0, 28, "int4"))
    assert default_kv_tokens(whole, 32768) == 4 * 32768
    assert default_kv_tokens(replace(whole, max_model_len=1000), 32768) == 4000
    assert default_kv_tokens(replace(whole, max_model_len=100), 32768) == LEAST_KV_TOKENS
    assert default_kv_tokens(replace(whole, max_model_len=10), 300) == 300


def test_a_kv_budget_that_was_asked_for_must_fit(config: ModelConfig) -> None:
    """Counted whole; a smaller one is the remedy."""
    stages = ("cpu", 0, 28, "int4")
    with pytest.raises(NotEnoughMemory, match=r"57\.3 GB of KV cache for 1000000 tokens"):
        fitting_kv_budget(plan(stages, budget=10**6), config, [join(free=8)], 10**5)
    fitting_kv_budget(plan(stages, budget=10**4), config, [join(free=8)], 10**5)


def test_a_budget_nobody_asked_for_is_what_fits(config: ModelConfig) -> None:
    """Full where there is room; with less room less, down to where the plan is refused."""
    stages = plan(("cpu", 0, 28, "int4"))
    assert fitting_kv_budget(stages, config, [join(free=40)], 131072) == 131072
    tight = fitting_kv_budget(stages, config, [join(free=6)], 131072)
    assert LEAST_KV_TOKENS < tight < 131072
    assert fitting_kv_budget(stages, config, [join(free=5.5)], 131072) < tight


def test_lines_say_needed_and_available_for_each_device(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before loading; also where nothing is refused because that was wished."""
    monkeypatch.setattr(memory, "host_memory", lambda: (64 * GB, 2 * GB))
    lines: list[str] = []
    stages = plan(("cuda:0", 0, 20, "int8"), ("cpu", 20, 28, "int8"))
    fitting_kv_budget(stages, config, [join("cuda:0", 8), join()], 4096, lines.append, refuse=False)
    on_gpu, on_cpu = lines
    assert on_gpu == "memory of cuda:0: 4.4 GB needed, 8.0 GB available (weights 4.1 GB, up to 2048 KV tokens)"
    assert on_cpu.endswith("GB needed, 2.0 GB available (weights 2.4 GB, up to 2048 KV tokens)")


def test_judging_is_exact() -> None:
    """A byte decides."""
    need = Need("stage 1", (HERE, "cpu"), 1000, 100, 10, 5)
    assert not judge([need], {(HERE, "cpu"): 1150}, 99, 99).shortages
    assert judge([need], {(HERE, "cpu"): 1149}, 99, 99).shortages


def test_a_launch_is_refused_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real workers, no assignment; told to go on, it does."""
    write_checkpoint(tmp_path)
    monkeypatch.setattr(memory, "host_memory", lambda: (10**9, 10**7))
    progress: list[object] = []
    with pytest.raises(NotEnoughMemory, match=r"cpu of .* has 10\.0 MB available"):
        launch(tmp_path, plan_for(PlanRequest(num_stages=2), 4), on_progress=progress.append)
    assert not progress
    with launch(tmp_path, plan_for(PlanRequest(), 4), check_memory=False) as chat_model:
        assert len(chat_model.generate([5, 6], max_new_tokens=2, ignore_eos=True).token_ids) == 2


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and the words; with --no-memory-check the line and the answer."""
    write_checkpoint(tmp_path)
    monkeypatch.setattr(memory, "host_memory", lambda: (10**9, 10**7))
    command = ["generate", "--model", str(tmp_path), "--ids", "5,6", "--max-new-tokens", "2", "--ignore-eos"]
    assert main(command) == 1
    assert "the plan does not fit into memory, nothing was loaded" in capsys.readouterr().err
    assert main([*command, "--no-memory-check"]) == 0
    assert "memory of cpu: 20" in capsys.readouterr().err
