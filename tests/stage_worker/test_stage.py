"""A stage keeps to the rules of a step: updates, positions, budget, and nothing changes for bystanders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.model import MOST_AT_ONCE, LayerStack
from glm.precision import Precision
from protocol.data import DropSequence, ForkSequence, KvUpdate, Span, Step, TruncateSequence
from stage_worker.errors import AbandonedError, InspectError, StepError
from stage_worker.stage import Stage
from tests.tiny_checkpoints import CAUSAL, PREFIX, write_checkpoint

HIDDEN = 32
TOKENS = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> LayerStack:
    """Layers 2-3 of a small causal model."""
    return load_layers(tmp_path_factory.mktemp("causal"), CAUSAL)


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> LayerStack:
    """Layers 2-3 of a small prefix LM."""
    return load_layers(tmp_path_factory.mktemp("prefix"), PREFIX)


def load_layers(model_dir: Path, keys: dict[str, Any]) -> LayerStack:
    """The layers [1, 3) of a fresh random model."""
    write_checkpoint(model_dir, keys)
    config = load_config(model_dir)
    return LayerStack.load(Checkpoint(model_dir), config, 1, 3, Precision.FP32, torch.device("cpu"))


def step(*parts: KvUpdate | Span) -> Step:
    """A step of these updates and spans."""
    spans = tuple(part for part in parts if isinstance(part, Span))
    return Step(1, 1, tuple(part for part in parts if not isinstance(part, Span)), spans, ())


def span(sequence_id: int, start_pos: int, num_tokens: int) -> Span:
    """A causal span."""
    return Span(sequence_id, start_pos, num_tokens, None, None)


def feed(stage: Stage, sequence_id: int, start_pos: int, tokens: torch.Tensor) -> torch.Tensor:
    """Give one sequence these tokens' hidden states from a position on."""
    return stage.run(step(span(sequence_id, start_pos, len(tokens))), tokens)


def test_spans_append_and_several_sequences_share_a_step(causal: LayerStack) -> None:
    """Sequences in one step get what they would get alone, and pieces give what the whole gives."""
    stage = Stage(causal, 100)
    whole = feed(stage, 1, 0, TOKENS[:6])
    feed(stage, 2, 0, TOKENS[:4])
    both = stage.run(step(span(2, 4, 2), span(3, 0, 6)), torch.cat((TOKENS[4:6], TOKENS[:6])))
    torch.testing.assert_close(both[:2], whole[4:])
    torch.testing.assert_close(both[2:], whole)
    assert (stage.kv_tokens, stage.num_sequences) == (18, 3)


def test_an_earlier_start_truncates_and_appends(causal: LayerStack) -> None:
    """start_pos < L overwrites from there: the same step twice gives the same result twice."""
    stage = Stage(causal, 100)
    feed(stage, 1, 0, TOKENS[:8])
    first = feed(stage, 1, 5, TOKENS[20:22])
    assert stage.kv_tokens == 7
    assert torch.equal(feed(stage, 1, 5, TOKENS[20:22]), first)
    assert stage.kv_tokens == 7


@pytest.mark.parametrize("sequence_id", [1, 9])
def test_a_later_start_is_a_cache_gap(causal: LayerStack, sequence_id: int) -> None:
    """start_pos > L fails, for a held and for an unknown sequence, and says what is cached."""
    stage = Stage(causal, 100)
    feed(stage, 1, 0, TOKENS[:3])
    with pytest.raises(StepError, match=r"goes on at position 5, [03] tokens are cached") as caught:
        stage.run(step(span(2, 0, 1), span(sequence_id, 5, 1)), TOKENS[:2])
    assert caught.value.code == "cache_gap"
    assert (stage.kv_tokens, stage.num_sequences) == (3, 1)


def test_the_budget_fails_the_step_and_names_the_numbers(causal: LayerStack) -> None:
    """A step beyond the budget changes nothing; truncating counts in its favour; others go on."""
    stage = Stage(causal, 10)
    feed(stage, 1, 0, TOKENS[:6])
    with pytest.raises(StepError, match="5 more tokens do not fit: 6 of this stage's KV budget of 10") as caught:
        stage.run(step(span(1, 6, 2), span(2, 0, 3)), TOKENS[:5])
    assert caught.value.code == "kv_budget"
    assert (stage.kv_tokens, stage.num_sequences) == (6, 1)
    feed(stage, 1, 6, TOKENS[6:10])
    feed(stage, 1, 2, TOKENS[:8])
    with pytest.raises(StepError, match="1 more tokens do not fit"):
        feed(stage, 1, 10, TOKENS[:1])
    feed(stage, 1, 9, TOKENS[:1])
    stage.run(step(DropSequence(1), span(2, 0, 10)), TOKENS[:10])
    assert (stage.kv_tokens, stage.num_sequences) == (10, 1)


def test_updates_come_in_order_and_before_the_spans(causal: LayerStack) -> None:
    """Fork, truncate and drop act on what the ones before them left."""
    stage = Stage(causal, 100)
    whole = feed(stage, 1, 0, TOKENS[:8])
    updates = (ForkSequence(1, 2, 6), TruncateSequence(2, 5), ForkSequence(2, 3, 4), DropSequence(1), DropSequence(77))
    result = stage.run(step(*updates, span(2, 5, 3), span(3, 4, 1)), torch.cat((TOKENS[5:8], TOKENS[4:5])))
    torch.testing.assert_close(result[:3], whole[5:8])
    torch.testing.assert_close(result[3:], whole[4:5])
    assert (stage.kv_tokens, stage.num_sequences) == (13, 2)
    stage.run(step(ForkSequence(2, 3, 8)), TOKENS[:0])
    assert (stage.kv_tokens, stage.num_sequences) == (16, 2)


@pytest.mark.parametrize(
    ("update", "code", "words"),
    [
        (TruncateSequence(9, 1), "unknown_sequence", "sequence 9 is not cached here"),
        (TruncateSequence(1, 5), "cache_gap", "sequence 1 has 4 tokens cached, 5 are wanted"),
        (ForkSequence(9, 2, 0), "unknown_sequence", "sequence 9 is not cached here"),
        (ForkSequence(1, 2, 5), "cache_gap", "sequence 1 has 4 tokens cached, 5 are wanted"),
        (ForkSequence(1, 2, 4), "kv_budget", "4 more tokens do not fit: 4 of this stage's KV budget of 7"),
    ],
)
def test_a_faulty_update_fails_the_step_but_not_the_other_updates(
    causal: LayerStack, update: KvUpdate, code: str, words: str
) -> None:
    """All stages keep the same history: what could be applied was applied, and no span was."""
    stage = Stage(causal, 7)
    feed(stage, 1, 0, TOKENS[:4])
    with pytest.raises(StepError, match=words) as caught:
        stage.run(step(TruncateSequence(9, 0), update, DropSequence(1), span(5, 0, 1)), TOKENS[:1])
    assert caught.value.code == code
    assert (stage.kv_tokens, stage.num_sequences) == (0, 0)


def test_a_step_without_spans_goes_the_whole_way(causal: LayerStack) -> None:
    """Updates alone are a step too; its empty hidden states keep their width."""
    assert Stage(causal, 7).run(step(DropSequence(1)), TOKENS[:0]).shape == (0, HIDDEN)


def test_a_failing_forward_grows_nothing(causal: LayerStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, or any fault inside the network, is that step's failure alone."""
    stage = Stage(causal, 100)
    feed(stage, 1, 0, TOKENS[:4])
    faults = {
        "out_of_memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "internal": KeyError("surprise"),
    }
    for code, fault in faults.items():

        def fail(*_args: object, fault: Exception = fault) -> torch.Tensor:
            raise fault

        with monkeypatch.context() as patch:
            patch.setattr(causal, "forward", fail)
            with pytest.raises(StepError) as caught:
                stage.run(step(span(1, 4, 1), span(2, 0, 1)), TOKENS[:2])
        assert caught.value.code == code
        assert (stage.kv_tokens, stage.num_sequences) == (4, 1)
    feed(stage, 1, 4, TOKENS[4:5])


def test_wrong_widths_and_layouts_are_bad_steps(causal: LayerStack, prefix: LayerStack) -> None:
    """Hidden states of another model, and a layout that does not suit this one, fail the step."""
    with pytest.raises(StepError, match="31 wide, this model's are 32"):
        feed(Stage(causal, 9), 1, 0, TOKENS[:2, :31])
    with pytest.raises(StepError, match="causal model has no prompt layout"):
        Stage(causal, 9).run(step(Span(1, 0, 2, 1, 0)), TOKENS[:2])
    stage = Stage(prefix, 99)
    with pytest.raises(StepError, match="prefix LM needs"):
        feed(stage, 1, 0, TOKENS[:2])
    with pytest.raises(StepError) as caught:
        stage.run(step(Span(1, 0, 3, 5, 4)), TOKENS[:3])
    assert caught.value.code == "bad_step"
    assert stage.num_sequences == 0


def test_a_prefix_prompt_and_its_tail(prefix: LayerStack) -> None:
    """A prefix LM's prompt in one span, then its tokens one by one, is one pass over all."""
    stage = Stage(prefix, 99)
    whole = stage.run(step(Span(1, 0, 9, 6, 5)), TOKENS[:9])
    stage.run(step(Span(2, 0, 7, 6, 5)), TOKENS[:7])
    tail = [stage.run(step(Span(2, pos, 1, 6, 5)), TOKENS[pos : pos + 1]) for pos in (7, 8)]
    torch.testing.assert_close(torch.cat(tail), whole[7:])


def test_an_abandoned_step_grows_nothing(causal: LayerStack) -> None:
    """Asked before every layer, if tokens are many; a step given up half-way leaves its sequences as they were."""
    stage = Stage(causal, 100)
    feed(stage, 1, 0, TOKENS[:4])
    asked: list[int] = []
    many = MOST_AT_ONCE + 1
    with pytest.raises(AbandonedError):
        stage.run(step(span(1, 4, many)), TOKENS[:many], lambda: asked.append(1) or len(asked) > 1)  # type: ignore[func-returns-value]
    assert len(asked) == 2
    assert stage.kv_tokens == 4


def test_inspection_shows_what_is_cached_and_recorded(causal: LayerStack) -> None:
    """Keys, values and every layer's output, through truncation and fork, as float32 with the token first."""
    stage = Stage(causal, 100, record_hidden_states=True)
    whole = feed(stage, 1, 0, TOKENS[:6])
    stage.run(step(span(2, 0, 4), span(1, 4, 2)), torch.cat((TOKENS[:4], TOKENS[4:6])))
    stage.run(step(ForkSequence(1, 3, 5), span(3, 5, 1)), TOKENS[5:6])
    for sequence_id, length in ((1, 6), (2, 4), (3, 6)):
        hidden = stage.inspect(sequence_id, 2, "hidden")
        torch.testing.assert_close(hidden, whole[:length])
        assert stage.inspect(sequence_id, 1, "hidden").shape == (length, HIDDEN)
        key, value = (stage.inspect(sequence_id, 1, what) for what in ("key", "value"))  # type: ignore[arg-type]
        assert key.shape == value.shape == (length, 2, 8)
        torch.testing.assert_close(key, stage.inspect(1, 1, "key")[:length])
    with pytest.raises(InspectError, match="layer 4 is not here: this stage has layers 2-3"):
        stage.inspect(1, 3, "key")
    with pytest.raises(InspectError, match="sequence 9"):
        stage.inspect(9, 1, "key")
    plain = Stage(causal, 100)
    feed(plain, 1, 0, TOKENS[:2])
    with pytest.raises(InspectError, match="not recorded"):
        plain.inspect(1, 1, "hidden")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_history_equals_a_fresh_start(causal: LayerStack, data: st.DataObject) -> None:
    """After any mix of steps and updates, what a sequence computes follows from its tokens alone."""
    stage, kept = Stage(causal, 1000), dict[int, list[int]]()
    ids = st.integers(1, 3)
    for _ in range(data.draw(st.integers(1, 8))):
        kind, first, second = data.draw(st.tuples(st.sampled_from(["append", "fork", "truncate", "drop"]), ids, ids))
        length = data.draw(st.integers(0, len(kept.get(first, []))))
        if kind == "append":
            new = data.draw(st.lists(st.integers(0, 63), min_size=1, max_size=5))
            feed(stage, first, length, TOKENS[new])
            kept[first] = kept.get(first, [])[:length] + new
        elif kind == "fork" and first in kept:
            stage.run(step(ForkSequence(first, second, length)), TOKENS[:0])
            kept[second] = kept[first][:length]
        elif kind == "truncate" and first in kept:
            stage.run(step(TruncateSequence(first, length)), TOKENS[:0])
            kept[first] = kept[first][:length]
        elif kind == "drop":
            stage.run(step(DropSequence(first)), TOKENS[:0])
            kept.pop(first, None)
    assert stage.kv_tokens == sum(map(len, kept.values()))
    for sequence_id, tokens in kept.items():
        fresh = feed(Stage(causal, 1000), 1, 0, TOKENS[[*tokens, 7]])
        torch.testing.assert_close(feed(stage, sequence_id, len(tokens), TOKENS[7:8]), fresh[-1:])
