"""Streams of a measured workload: what is timed is what was asked for, with one step in flight and with several."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.bench import check_room, kv_tokens
from coordinator.bench_report import Workload
from coordinator.bench_streams import Streams
from coordinator.chat_model import ChatModel
from coordinator.errors import UsageError
from coordinator.pacing import Pacing
from coordinator.planning import plan_for
from tests.in_process import in_process_engine
from tests.tiny_checkpoints import FAMILIES, write_checkpoint


def chat_model_over(model_dir: Path, keys: dict[str, Any], **settings: Any) -> ChatModel:
    """Two stages of this process."""
    num_layers = write_checkpoint(model_dir, keys).num_layers
    engine, _, config = in_process_engine(model_dir, [(0, 1), (1, num_layers)], **settings)
    cluster: Any = SimpleNamespace(plan=plan_for(None, num_layers, ["cpu"]), kv_budgets=())
    return ChatModel(cluster, engine, config, model_dir, None)


class Reader:
    """Notes how many steps were under way when memory was read."""

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self.in_flight: list[int] = []

    def read(self) -> None:
        self.in_flight.append(self._model.engine.load().steps_in_flight)


@pytest.mark.parametrize("family", ["chatglm", "chatglm2"])
@pytest.mark.parametrize("steps_in_flight", [1, 2, 3])
def test_every_stream_gets_its_tokens_and_no_more(family: str, steps_in_flight: int, tmp_path: Path) -> None:
    """No answer goes on while prompts are fed; then rounds, evenly; memory is read with nothing under way; drafts and
    kept prefixes help nobody; afterwards the engine is as before."""
    model = chat_model_over(
        tmp_path, FAMILIES[family], max_steps_in_flight=3, steps_in_flight=steps_in_flight, speculate=True, reuse=True
    )
    workload = Workload(num_prompt_tokens=20, num_new_tokens=40, num_streams=5)
    kinds: list[str] = []
    model.engine.observers.append(lambda record: kinds.append(record.kind))
    for _ in range(2):
        with Streams(model, workload) as streams:
            sequences = [answer.sequence for answer in streams._answers]
            kinds.clear()
            first_token_s, prefill = streams.prefill(lambda *_: None)
            assert set(kinds) <= {"prefill", "updates"}
            assert 0 < first_token_s <= prefill.wall_s
            assert [len(sequence.new_ids) for sequence in sequences] == [1] * 5
            streams.rounds(1)
            reader: Any = Reader(model)
            decode = streams.decode(lambda *_: None, [reader])
            lengths = [len(sequence.new_ids) for sequence in sequences]
            assert max(lengths) - min(lengths) <= 2
            assert 20 + max(lengths) <= workload.tokens_per_stream
            assert reader.in_flight == [0] * 3
            assert 5 * 40 <= decode.num_new_tokens < 5 * 40 + 3 * 5
            assert len(decode.timings) >= 40 * steps_in_flight
            assert all(s.num_drafted == s.num_reused == s.num_set_back == 0 for s in sequences)
        assert model.engine.is_idle and not model.engine.holds_answers


def test_streams_that_cannot_run_together_are_refused(tmp_path: Path) -> None:
    """Too few sequences, too little KV cache; with exactly what is said to be needed they run."""
    workload = Workload(num_prompt_tokens=10, num_new_tokens=3, num_streams=6)
    model = chat_model_over(tmp_path, FAMILIES["chatglm2"], kv_budget_tokens=kv_tokens(workload), max_num_seqs=6)
    check_room(model, workload)
    with Streams(model, workload) as streams:
        streams.prefill(lambda *_: None)
        streams.decode(lambda *_: None)
    with pytest.raises(UsageError, match="7 streams, but max_num_seqs is 6"):
        check_room(model, Workload(10, 3, 7))
    with pytest.raises(UsageError, match=r"6 streams need \d+ tokens of KV cache"):
        check_room(model, Workload(10, 4, 6))


def test_what_was_tried_is_known() -> None:
    """Nothing to choose counts as tried; else every number of steps must have been measured."""
    assert Pacing(3).has_tried_all(1)
    assert Pacing(1).has_tried_all(8)
    assert Pacing(3, fixed=2).has_tried_all(8)
    pacing, now_s = Pacing(3), 0.0
    assert not pacing.has_tried_all(8)
    for _ in range(100):
        now_s += 1.0
        pacing.observe(8, 8, now_s)
    assert pacing.has_tried_all(8)
    assert not pacing.has_tried_all(2)
