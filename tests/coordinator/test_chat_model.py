"""What a chat model says of itself and writes down, without workers."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coordinator.batch import LocalBackend, Request, answers_to
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
from tests.coordinator.fake_backend import STATS
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


@pytest.mark.parametrize("bound", [None, 8192])
def test_a_prompt_beyond_a_published_bound_has_the_rest_of_the_context(bound: int | None, tmp_path: Path) -> None:
    """8192 tokens are what chat() was published with, not what the model holds; below a file's bound it ends there."""
    write_checkpoint(tmp_path, {**CAUSAL, "seq_length": 32768})
    if bound is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": bound}))
    cluster: Any = SimpleNamespace(plan=plan_for(None, 4, ["cpu"]), kv_budgets=(100_000,))
    engine: Any = SimpleNamespace(
        new_sequence_id=lambda: 1, add=lambda _: None, settings=SchedulerSettings(100_000), cancel=lambda _: None
    )
    model = ChatModel(cluster, engine, load_config(tmp_path), tmp_path, None)
    for num_prompt, most in ((9000, 100), (8100, 100 if bound is None else 92)):
        sequence = model.begin(TokenPrompt((5,) * num_prompt)).sequence
        while not sequence.is_finished and len(sequence.new_ids) < 100:
            sequence.append(7)
        assert (len(sequence.new_ids), sequence.finish_reason) == (most, None if most == 100 else "length")


def test_a_temperature_is_not_lost_on_a_model_that_is_greedy_by_default(chat_model: ChatModel) -> None:
    """Who gives a rule for choosing wants a choice, unless greedy is said as well."""
    greedy = dataclasses.replace(chat_model.defaults.sampling, greedy=True, top_k=50)
    chat_model.defaults = dataclasses.replace(chat_model.defaults, sampling=greedy)
    assert chat_model._sampling({"temperature": 0.3}).greedy is False
    assert chat_model._sampling({"temperature": 0.3, "greedy": True}).greedy is True
    assert chat_model._sampling({"max_new_tokens": 3}).greedy is True


def test_an_answer_that_breaks_off_is_warned_of_in_python(
    chat_model: ChatModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`chat` gives a text and a history, which do not tell it."""
    finished = Finished(0, "context_full", "so far", (5,), STATS)
    monkeypatch.setattr(chat_model, "stream", lambda *_: iter([finished]))
    with pytest.warns(UserWarning, match="breaks off here, as the context is full"):
        assert chat_model.chat("Hello")[0] == "so far"


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


def test_the_greatest_seed_has_as_many_answers_as_any(tmp_path: Path) -> None:
    """The second has the seed that follows, as a request with that one gets; none is lost."""
    write_checkpoint(tmp_path, CAUSAL)
    engine, _, config = in_process_engine(tmp_path, [(0, 4)])
    cluster: Any = SimpleNamespace(plan=plan_for(None, config.num_layers, ["cpu"]), kv_budgets=(1000,))
    model = ChatModel(cluster, engine, config, tmp_path, None)
    sampling = with_changes(model.describe().defaults, seed=2**63 - 1, max_new_tokens=5, ignore_eos=True)
    last, first = answers_to(LocalBackend(model), Request(TokenPrompt((5, 6, 7)), sampling, 2))
    [alone] = answers_to(LocalBackend(model), Request(TokenPrompt((5, 6, 7)), with_changes(sampling, seed=0)))
    assert last.finished is not None and len(last.finished.token_ids) == 5
    assert first.finished is not None and alone.finished is not None
    assert first.finished.token_ids == alone.finished.token_ids
