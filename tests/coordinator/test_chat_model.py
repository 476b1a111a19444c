"""What a chat model says of itself and writes down, without workers."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coordinator.chat_model import ChatModel
from coordinator.dump import dump
from coordinator.errors import DumpError, GenerationError
from coordinator.planning import plan_for
from coordinator.prompts import check_prompt
from coordinator.scheduler import SchedulerSettings
from coordinator.timing import EndsShare, StageShare, StepTiming
from glm.config import load_config
from protocol.client import Delta, Finished, TokenPrompt
from protocol.records import with_changes
from protocol.wire import encode
from tests.golden import GoldenSet
from tests.in_process import in_process_engine
from tests.tiny_checkpoints import CAUSAL, PREFIX, write_checkpoint


@pytest.fixture
def chat_model(tmp_path: Path) -> ChatModel:
    """Over no pipeline at all."""
    write_checkpoint(tmp_path, CAUSAL)
    config = dataclasses.replace(load_config(tmp_path), name="/models/" + "deep/" * 100)
    cluster: Any = SimpleNamespace(plan=plan_for(None, config.num_layers, ["cpu"]), kv_budgets=(1000,))
    engine: Any = SimpleNamespace(cancel=lambda _: None, settings=SchedulerSettings(1000))
    return ChatModel(cluster, engine, config, tmp_path, None)


def test_a_prefix_lms_conversation_must_fit_into_a_step(tmp_path: Path) -> None:
    """It is computed in one step, which one message carries: refused by that name; of a causal model it is cut."""
    write_checkpoint(tmp_path, PREFIX)
    prefix, limits = load_config(tmp_path), SchedulerSettings(1000, max_step_tokens=20)
    with pytest.raises(GenerationError, match="30 tokens, one step, in which a prefix LM's conversation is computed"):
        check_prompt([1] * 30, prefix, limits)
    check_prompt([1] * 19, prefix, limits)
    write_checkpoint(tmp_path / "causal", CAUSAL)
    check_prompt([1] * 30, load_config(tmp_path / "causal"), limits)


def test_a_description_fits_its_message_however_long_the_models_name_is(chat_model: ChatModel) -> None:
    """config.json may hold a path of any length; clients get its beginning."""
    described = chat_model.describe()
    assert encode(described)
    assert described.model_name.startswith("/models/deep/")
    assert described.max_context == min(1000, chat_model.config.max_context)


def test_a_recovery_that_brings_the_same_stages_back_leaves_what_they_cost(chat_model: ChatModel) -> None:
    """Every recovery makes the plan anew; only another one makes the sums of an answer begin again."""
    engine: Any = chat_model.engine
    engine.new_sequence_id, engine.add = lambda: 1, lambda _: None
    answer, plan = chat_model.begin(TokenPrompt((5, 9))), chat_model.cluster.plan
    timing = StepTiming(0.0, 2.0, (StageShare(1.0, 0.5, 7),), EndsShare(0.0, 0.0, 0.0, 0.0))
    answer.account(timing)
    answer.follow(dataclasses.replace(plan))
    answer.account(timing)
    assert answer.close()[1].stats.stages[0].compute_s == 2.0
    answer.follow(dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], host="lab3"),)))
    assert answer.close()[1].stats.stages[0].compute_s == 0.0


def test_a_dump_that_cannot_be_written_says_so(
    chat_model: ChatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, the reason and the room it needs; no traceback."""

    def row(*_: object) -> torch.Tensor:
        return torch.zeros(2, 3)

    head = SimpleNamespace(final_norm=row, logits=row)
    chat_model.engine = SimpleNamespace(  # type: ignore[assignment]
        head=head, embedding=SimpleNamespace(forward=row), prefill=row, cancel=lambda _: None
    )
    monkeypatch.setattr(chat_model, "begin", lambda *_: SimpleNamespace(sequence=SimpleNamespace(sequence_id=1)))
    chat_model.cluster.inspect = row  # type: ignore[method-assign]
    with pytest.raises(DumpError, match=r"nowhere/x\.safetensors cannot be written .* make room"):
        dump(chat_model, [1, 2], tmp_path / "nowhere" / "x.safetensors")


def test_answers_that_are_read_in_turns_lose_nothing(shared_dir: Path) -> None:
    """A step for one iterator moves the other on as well: what it gave is told when that one is read again."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, _, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])
    cluster: Any = SimpleNamespace(plan=plan_for(None, config.num_layers, ["cpu"]), kv_budgets=(1000,))
    model = ChatModel(cluster, engine, config, golden.checkpoint_dir, None)
    sampling = with_changes(model.describe().defaults, greedy=True, max_new_tokens=7)
    streams = [model.stream(TokenPrompt(tuple(row.token_ids)), sampling) for _ in range(2)]
    told: list[list[int]] = [[], []]
    wholes: list[tuple[int, ...]] = [(), ()]
    for _ in range(20):
        for index, stream in enumerate(streams):
            event = next(stream, None)
            if isinstance(event, Delta):
                told[index] += event.token_ids
            elif isinstance(event, Finished):
                wholes[index] = event.token_ids
    assert wholes == [row.greedy_ids[:7]] * 2
    assert [tuple(ids) for ids in told] == wholes


def test_an_answer_counts_the_scores_that_were_no_numbers(shared_dir: Path) -> None:
    """lm_head gives NaN: the answer is the fixed token each time, and its statistics say how often."""
    golden = GoldenSet(shared_dir, "chatglm2")
    engine, _, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])
    engine.head = SimpleNamespace(forward=lambda hidden: torch.full((len(hidden), config.vocab_size), torch.nan))  # type: ignore[assignment]
    cluster: Any = SimpleNamespace(plan=plan_for(None, config.num_layers, ["cpu"]), kv_budgets=(1000,))
    model = ChatModel(cluster, engine, config, golden.checkpoint_dir, None)
    finished = model.generate([5, 6, 7], max_new_tokens=4)
    assert set(finished.token_ids) == {model.defaults.guard_id}
    assert (finished.stats.guarded_tokens, finished.stats.new_tokens) == (4, 4)
