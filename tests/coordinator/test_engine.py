"""The engine over in-process stages: tokens, batches, failures, budgets."""

import itertools
import time
from pathlib import Path

import pytest

from coordinator.sequence import Sequence
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.model import Model
from protocol.data import DropSequence
from tests.golden import GoldenSet
from tests.in_process import in_process_engine, sequence_for
from tests.tiny_checkpoints import write_checkpoint

FAMILIES = ["chatglm", "chatglm2", "chatglm3", "glm4"]


def splits_of(num_layers: int) -> list[list[tuple[int, int]]]:
    """Every way to cut the layers into contiguous ranges."""
    found = []
    for cuts in itertools.product([False, True], repeat=num_layers - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), num_layers]
        found.append(list(itertools.pairwise(edges)))
    return found


def drain(engine) -> None:  # type: ignore[no-untyped-def]
    while not engine.is_idle:
        engine.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_split_generates_the_undivided_models_tokens(family: str, shared_dir: Path) -> None:
    """Rung 3 at the engine: all 16 splits of 5 layers, the reference's prompt, the reference's greedy ids."""
    golden = GoldenSet(shared_dir, family)
    row = next(row for row in golden.rows() if row.case == "short")
    for ranges in splits_of(5):
        engine, _, config = in_process_engine(golden.checkpoint_dir, ranges)
        sequence = sequence_for(engine, config, list(row.token_ids), len(row.greedy_ids))
        drain(engine)
        assert tuple(sequence.new_ids) == row.greedy_ids
        assert sequence.finish_reason == "length"


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_run_together_get_the_tokens_they_get_alone(family: str, shared_dir: Path) -> None:
    """A batch gives each row the answer it gets alone, also when rows join and end at different steps."""
    golden = GoldenSet(shared_dir, family)
    rows = [row for row in golden.rows() if row.case == "batch3_left_pad"]
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 2), (2, 5)])
    sequences = []
    for length, row in zip((5, 24, 11), rows, strict=True):
        sequences.append(sequence_for(engine, config, list(row.token_ids), length))
        engine.step()
    drain(engine)
    for sequence, row in zip(sequences, rows, strict=True):
        assert tuple(sequence.new_ids) == row.greedy_ids[: len(sequence.new_ids)]
    assert max(len(step.spans) for step in pipeline.steps) == 3
    assert all(stage.num_sequences == 0 for stage in pipeline.stages)


def test_equal_seeds_give_equal_samples(shared_dir: Path) -> None:
    """The same seed and plan give the same ids; another seed gives others."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, _, config = in_process_engine(golden.checkpoint_dir, [(0, 3), (3, 5)])

    def sampled(seed: int) -> list[int]:
        sequence = sequence_for(engine, config, list(row.token_ids), 12, greedy=False, temperature=2.0, seed=seed)
        drain(engine)
        return sequence.new_ids

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)


def test_a_shorter_limit_gives_a_prefix(shared_dir: Path) -> None:
    """Fewer new tokens are the beginning of more new tokens, and the limit counts new tokens only."""
    golden = GoldenSet(shared_dir, "chatglm3")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, _, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])
    long, short = (sequence_for(engine, config, list(row.token_ids), n) for n in (10, 4))
    drain(engine)
    assert len(short.new_ids) == 4
    assert short.new_ids == long.new_ids[:4]


def test_a_long_causal_prompt_is_fed_in_chunks(shared_dir: Path) -> None:
    """Chunks of a causal prompt give the reference's tokens; a prefix LM's prompt travels whole."""
    for family, whole in (("chatglm2", False), ("chatglm", True)):
        golden = GoldenSet(shared_dir, family)
        row = next(row for row in golden.rows() if row.case == "long")
        engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 5)], prefill_chunk=7)
        sequence = sequence_for(engine, config, list(row.token_ids), 6)
        drain(engine)
        assert tuple(sequence.new_ids) == row.greedy_ids[:6]
        assert (pipeline.steps[0].num_tokens == len(row.token_ids)) is whole


def test_a_request_beyond_the_kv_budget_waits_for_room(shared_dir: Path) -> None:
    """Two requests outgrow the budget together: the newer one is computed again when the older has ended."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 5)], kv_budget_tokens=70, stage_budget=70)
    older = sequence_for(engine, config, list(row.token_ids), 24)
    newer = sequence_for(engine, config, list(row.token_ids), 24)
    drain(engine)
    assert tuple(older.new_ids) == tuple(newer.new_ids) == row.greedy_ids
    assert pipeline.stages[0].kv_tokens == 0


def test_a_stage_failure_fails_the_sequences_of_that_step_only(shared_dir: Path) -> None:
    """A stage that refuses a step names itself; a later request on the same engine succeeds."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 2), (2, 5)], stage_budget=12)
    failed = sequence_for(engine, config, list(row.token_ids), 24)
    drain(engine)
    assert "stage 1" in str(failed.error) and "kv_budget" in str(failed.error)
    assert all(stage.kv_tokens == 0 for stage in pipeline.stages)
    good = sequence_for(engine, config, list(row.token_ids), 2)
    drain(engine)
    assert tuple(good.new_ids) == row.greedy_ids[:2]


def test_a_head_without_memory_fails_the_step_only(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An lm_head that runs out of memory fails that request with its words; the next one succeeds."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])

    def out_of_memory(_hidden: object) -> None:
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.head, "forward", out_of_memory)
        failed = sequence_for(engine, config, list(row.token_ids), 4)
        drain(engine)
    assert "could not compute the logits: CUDA out of memory" in str(failed.error)
    assert pipeline.stages[0].num_sequences == 0
    good = sequence_for(engine, config, list(row.token_ids), 4)
    drain(engine)
    assert tuple(good.new_ids) == row.greedy_ids[:4]


def test_cancel_makes_all_stages_forget_the_sequence(shared_dir: Path) -> None:
    """After a cancel no stage holds anything of it, although no other request is running."""
    golden = GoldenSet(shared_dir, "chatglm3")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 1), (1, 5)])
    sequence = sequence_for(engine, config, list(row.token_ids), 24)
    engine.step()
    assert pipeline.stages[1].kv_tokens == len(row.token_ids) + 1  # the next step is on its way already
    engine.cancel(sequence)
    assert sequence.finish_reason == "cancelled"
    assert DropSequence(sequence.sequence_id) in pipeline.steps[-1].updates
    assert [stage.num_sequences for stage in pipeline.stages] == [0, 0]


def test_an_interrupted_walk_leaves_the_next_request_untouched(shared_dir: Path) -> None:
    """Ctrl-C between a step and its outcome: the late outcome is nobody else's, and the stages still forget."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 2), (2, 5)])
    for method in ("collect", "submit"):
        interrupted = sequence_for(engine, config, list(row.token_ids), 4)
        engine.step()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pipeline, method, _interrupt)
            engine.cancel(interrupted) if method == "submit" else engine.step()
        engine.cancel(interrupted)
        good = sequence_for(engine, config, list(row.token_ids), 4)
        drain(engine)
        assert tuple(good.new_ids) == row.greedy_ids[:4]
        assert [stage.num_sequences for stage in pipeline.stages] == [0, 0]


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_context_full_is_told_apart_from_length(shared_dir: Path) -> None:
    """An answer that reaches the end of the model's context says so."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, _, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])
    sequence = sequence_for(engine, config, list(row.token_ids), 24)
    sequence._max_context = len(row.token_ids) + 3
    drain(engine)
    assert sequence.finish_reason == "context_full"
    assert len(sequence.new_ids) == 3


def test_engine_equals_the_undivided_models_own_greedy(shared_dir: Path) -> None:
    """The engine adds nothing to the network: its tokens are `Model.greedy`'s for every family."""
    for family in FAMILIES:
        directory = GoldenSet(shared_dir, family).checkpoint_dir
        row = next(row for row in GoldenSet(shared_dir, family).rows() if row.case == "short")
        engine, _, config = in_process_engine(directory, [(0, 5)])
        sequence = sequence_for(engine, config, list(row.token_ids), 9)
        drain(engine)
        assert sequence.new_ids == Model.load(Checkpoint(directory), load_config(directory)).greedy(row.token_ids, 9)


def test_a_steps_timing_names_the_ends_own_parts(tmp_path: Path) -> None:
    """Embedding, head and sampling of a step that samples, within the time that the step took as a whole."""
    write_checkpoint(tmp_path)
    engine, _, config = in_process_engine(tmp_path, [(0, 4)])
    sequence_for(engine, config, [5, 6, 7], 2)
    started_s = time.monotonic()
    [(_, timing)] = engine.step()
    assert timing is not None
    ends = timing.ends
    assert min(ends.embedding_s, ends.head_s, ends.sampling_s) > 0
    assert ends.compute_s < time.monotonic() - started_s


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "glm4"])
def test_a_second_turn_feeds_only_its_new_tokens(family: str, shared_dir: Path) -> None:
    """What the first turn left is taken over; the tokens are those of a fresh start, in fp32."""
    golden = GoldenSet(shared_dir, family)
    row = next(row for row in golden.rows() if row.case == "short")
    second = [*row.token_ids, *row.greedy_ids[:12], *row.token_ids[:5]]
    fresh, _, config = in_process_engine(golden.checkpoint_dir, [(0, 2), (2, 5)])
    wanted = sequence_for(fresh, config, second, 10)
    drain(fresh)
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 2), (2, 5)], reuse=True, speculate=False)
    sequence_for(engine, config, list(row.token_ids), 12)
    drain(engine)
    num_steps = len(pipeline.steps)
    again = sequence_for(engine, config, second, 10)
    drain(engine)
    assert again.new_ids == wanted.new_ids
    assert again.num_reused == len(row.token_ids) + 11  # the last token was sampled, never fed
    assert pipeline.steps[num_steps].num_tokens == 6
    engine.forget_prefixes()
    assert all(stage.kv_tokens == 0 for stage in pipeline.stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_to_one_prompt_share_its_cache(family: str, shared_dir: Path) -> None:
    """A leader's prompt is fed once and forked, if the family is causal; each answer is that of a request alone."""
    golden = GoldenSet(shared_dir, family)
    row = next(row for row in golden.rows() if row.case == "long")
    prompt, hot = list(row.token_ids), {"greedy": False, "temperature": 1.5}
    alone, _, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])
    wanted = []
    for seed in range(3):
        wanted.append(sequence_for(alone, config, prompt, 8, seed=seed, **hot))
        drain(alone)
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 5)], reuse=True)
    together: list[Sequence] = []
    for seed in range(3):
        together.append(sequence_for(engine, config, prompt, 8, seed=seed, **hot))
        if together[:-1] and not config.is_prefix_lm:
            together[-1].leader = together[0]
    drain(engine)
    assert [sequence.new_ids for sequence in together] == [sequence.new_ids for sequence in wanted]
    fed = sum(span.num_tokens for step in pipeline.steps for span in step.spans if span.num_tokens > 5)
    assert fed == (3 if config.is_prefix_lm else 1) * len(prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_speculation_changes_no_token(family: str, shared_dir: Path) -> None:
    """Answers that repeat themselves are drafted and verified: the same tokens in fewer steps, greedy and seeded."""
    golden = GoldenSet(shared_dir, family)
    row = next(row for row in golden.rows() if row.case == "short")
    found = {}
    for speculate in (False, True):
        engine, _, config = in_process_engine(golden.checkpoint_dir, [(0, 2), (2, 5)], speculate=speculate)
        greedy = sequence_for(engine, config, list(row.token_ids), 90)
        seeded = sequence_for(engine, config, list(row.token_ids), 60, greedy=False, temperature=0.7, seed=3)
        for sequence in (greedy, seeded):
            sequence.draft_length.choose = lambda *_: 4  # type: ignore[method-assign] # whatever this machine measures
        drain(engine)
        found[speculate] = (greedy.new_ids, seeded.new_ids)
        assert (greedy.num_drafted > 0) is speculate
    assert found[True] == found[False]


class _Panic(BaseException):
    """As what libraries written in Rust raise: no Exception."""


@pytest.mark.parametrize("fault", [_Panic("gave up"), RuntimeError("device lost"), IndexError("out of range")])
@pytest.mark.parametrize("speculate", [False, True])
def test_a_sampler_that_fails_fails_its_own_request_only(
    fault: BaseException, speculate: bool, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sequences in the same steps: one's error, of whatever class, and the other's tokens."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 5)], speculate=speculate)
    bad, good = (sequence_for(engine, config, list(row.token_ids), 4) for _ in range(2))

    def fail(_logits: object) -> int:
        raise fault

    monkeypatch.setattr(bad.sampler, "sample", fail)
    drain(engine)
    assert str(bad.error) == f"the coordinator could not choose a token: {fault}"
    assert tuple(good.new_ids) == row.greedy_ids[:4]
    assert pipeline.stages[0].num_sequences == 0


def test_an_embedding_that_fails_fails_the_step_only(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without memory for a prompt's embeddings: that request is told, the stages never hear of it."""
    golden = GoldenSet(shared_dir, "chatglm2")
    row = next(row for row in golden.rows() if row.case == "short")
    engine, pipeline, config = in_process_engine(golden.checkpoint_dir, [(0, 5)])
    good = sequence_for(engine, config, list(row.token_ids), 4)
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.embedding, "forward", _no_memory)
        failed = sequence_for(engine, config, list(row.token_ids), 4)
        told = [sequence for _ in range(2) for sequence, _ in engine.step()]
    assert failed in told and "could not embed the tokens: no memory" in str(failed.error)
    again = sequence_for(engine, config, list(row.token_ids), 4)
    drain(engine)
    assert tuple(again.new_ids) == row.greedy_ids[:4]
    assert good.is_finished and pipeline.stages[0].num_sequences == 0


def _no_memory(_: object) -> None:
    raise RuntimeError("no memory")
