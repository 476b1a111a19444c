"""Two real worker processes in a chain, through everything that can happen while they serve."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.model import LayerStack
from glm.precision import Precision
from protocol.control import Failed, Inspect, Inspected, Ping, Pong, Ready, Release, Released
from protocol.data import DropSequence, ForkSequence, Span, Step, StepFailed
from protocol.torch_bridge import from_raw
from protocol.version import VERSION
from stage_worker.stage import Stage
from tests.stage_worker.fake_coordinator import FakeCoordinator, FakeWorker, fake_coordinator, wait_until
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

HIDDEN = torch.randn(80, 32, generator=torch.Generator().manual_seed(3))
Chain = tuple[FakeCoordinator, FakeWorker, FakeWorker]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small causal model of four layers."""
    path = tmp_path_factory.mktemp("tiny")
    write_checkpoint(path, CAUSAL, num_shards=2)
    return path


@pytest.fixture(scope="module")
def large_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 90 MB in four layers: long enough to load that something can happen meanwhile."""
    path = tmp_path_factory.mktemp("large")
    keys = {"hidden_size": 1024, "kv_channels": 64, "num_attention_heads": 16, "ffn_hidden_size": 2816}
    write_checkpoint(path, {**CAUSAL, **keys, "torch_dtype": "float16"})
    return path


@pytest.fixture(scope="module")
def joined() -> Iterator[Chain]:
    """Two workers that have joined."""
    with fake_coordinator() as coordinator:
        first, second = coordinator.spawn("--worker-id", "one"), coordinator.spawn("--worker-id", "two")
        coordinator.admit(first, second)
        yield coordinator, first, second


@pytest.fixture
def idle(joined: Chain) -> Iterator[Chain]:
    """Two idle workers; whatever a test made of them is released afterwards."""
    yield joined
    for worker in joined[1:]:
        worker.progress.clear()
        assert worker.release().freed_bytes >= 0
        assert worker.ping().state == "idle"


@pytest.fixture
def chain(idle: Chain, model_dir: Path) -> Chain:
    """Layers 1-2 on the first worker, 3-4 on the second, results to the coordinator."""
    coordinator, first, second = idle
    assign_chain(first, second, model_dir)
    return coordinator, first, second


def assign_chain(first: FakeWorker, second: FakeWorker, model_dir: Path, **changes: Any) -> None:
    """Make two workers the two stages of a pipeline."""
    endpoint = second.join.data_endpoint
    settings = {"num_stages": 2, "record_hidden_states": True, **changes}
    assert isinstance(second.assign(model_dir, 2, 4, stage_index=1, **settings), Ready)
    assert isinstance(first.assign(model_dir, 0, 2, next_endpoint=endpoint, **settings), Ready)


def in_process(model_dir: Path, start: int, end: int) -> Stage:
    """The stage a worker with these layers should be."""
    layers = LayerStack.load(
        Checkpoint(model_dir), load_config(model_dir), start, end, Precision.FP32, torch.device("cpu")
    )
    return Stage(layers, 100, record_hidden_states=True)


def span(sequence_id: int, start_pos: int, num_tokens: int) -> Span:
    """A causal span."""
    return Span(sequence_id, start_pos, num_tokens, None, None)


def test_a_worker_says_who_it_is(joined: Chain) -> None:
    """Join carries versions, device, memory and where to send steps."""
    for worker, worker_id in zip(joined[1:], ("one", "two"), strict=True):
        join = worker.join
        assert (join.worker_id, join.glmpipe_version, join.device) == (worker_id, VERSION, "cpu")
        assert join.torch_version == torch.__version__
        assert join.num_threads == 1
        assert 0 < join.memory_free_bytes <= join.memory_total_bytes
        assert join.data_endpoint.startswith(f"ipc://{joined[0].directory}/")


def test_a_chain_equals_the_stages_in_process(chain: Chain, model_dir: Path) -> None:
    """Prefill, decode, fork and overwrite through two processes, bit for bit; timings, health and caches fit."""
    coordinator, first, second = chain
    stages = [in_process(model_dir, 0, 2), in_process(model_dir, 2, 4)]
    assert [(p.layers_done, p.layers_total) for p in first.progress] == [(0, 2), (1, 2), (2, 2)]
    assert first.progress[-1].weight_bytes == stages[0].layers.weight_bytes
    for parts in (
        (span(1, 0, 7),),
        (span(1, 7, 1), span(2, 0, 5)),
        (ForkSequence(1, 3, 4), span(3, 4, 2), span(2, 3, 1)),
        (DropSequence(2),),
    ):
        num_tokens = sum(part.num_tokens for part in parts if isinstance(part, Span))
        step = coordinator.send_step(first, HIDDEN[:num_tokens], *parts)
        message, result = coordinator.collect()
        expected = stages[1].run(step, stages[0].run(step, HIDDEN[:num_tokens]))
        assert isinstance(message, Step)
        assert torch.equal(result, expected)
        assert [timing.stage_index for timing in message.timings] == [0, 1]
        assert [timing.kv_tokens for timing in message.timings] == [stage.kv_tokens for stage in stages]
        for timing in message.timings:
            assert timing.received_at_s + timing.compute_s <= timing.sent_at_s
    for worker, stage in zip((first, second), stages, strict=True):
        pong = worker.ping()
        assert (pong.state, pong.epoch, pong.num_steps) == ("serving", 1, 4)
        assert (pong.kv_tokens, pong.num_sequences) == (stage.kv_tokens, stage.num_sequences)
        assert pong.weight_bytes == stage.layers.weight_bytes
        assert pong.busy_s > 0
    for what in ("hidden", "key", "value"):
        second.post(Inspect(5, 3, 2, what, 1))  # type: ignore[arg-type]
        answer, (tensor,) = second.next_message()
        held = stages[1].inspect(3, 2, what)  # type: ignore[arg-type]
        assert answer == Inspected(5, 1, 3, 2, what, 1, len(held))  # type: ignore[arg-type]
        assert torch.equal(from_raw(tensor), held[1:])
    assert second.request(Inspect(6, 3, 0, "key", 0)).code == "bad_request"


def test_hidden_states_travel_in_the_dtype_the_plan_names(idle: Chain, model_dir: Path) -> None:
    """activation_dtype converts what leaves a stage; the next one computes in its own dtype again."""
    coordinator, first, second = idle
    assign_chain(first, second, model_dir, activation_dtype="bfloat16")
    coordinator.send_step(first, HIDDEN[:3].to(torch.float16), span(1, 0, 3))
    _, result = coordinator.collect()
    assert result is not None
    assert result.dtype == torch.bfloat16


def test_garbage_is_dropped_and_serving_goes_on(chain: Chain) -> None:
    """Random and hostile frames leave one line each (an empty one among the steps, which only wakes a worker, none).

    Steps and pings are answered as ever.
    """
    coordinator, first, _ = chain
    lines_before = len(first.log.splitlines())
    header = {"p": "glmpipe", "v": 2, "t": "Step", "b": {}, "x": []}
    junk: list[list[bytes]] = [
        [b""],
        [b"\x00" * 100],
        [b"\x91" * 5000],
        [b"one", b"two", b"three"] * 5,
        [msgpack.packb(header)],
        [msgpack.packb({**header, "v": 99})],
        [msgpack.packb({**header, "t": "no\nnews" * 1000})],
    ]
    for frames in junk:
        coordinator.push_to(first).send_multipart(frames)
        coordinator.router.send_multipart([first.identity, *frames])
    first.post(Pong(1, "idle", 0, 0.0, 0, 0, 0, 0, 0, 0, 0))
    coordinator.send_step(first, HIDDEN[:2], span(1, 0, 2), timings=())
    message, result = coordinator.collect()
    assert isinstance(message, Step)
    assert result is not None
    assert first.ping().num_steps == 1
    new_lines = first.log.splitlines()[lines_before:]
    assert len(new_lines) == 2 * len(junk)  # all but the waking, and the Pong
    assert all(line.startswith("WARNING dropped a") for line in new_lines)


def test_steps_of_another_epoch_are_dropped(chain: Chain) -> None:
    """Neither older nor newer frames are answered, and they change nothing."""
    coordinator, first, _ = chain
    for epoch in (0, 2):
        coordinator.send_step(first, HIDDEN[:2], span(1, 0, 2), epoch=epoch)
    coordinator.send_step(first, HIDDEN[:1], span(2, 0, 1), step_id=7007)
    assert coordinator.collect()[0].step_id == 7007
    assert first.ping().kv_tokens == 1


def test_a_step_that_was_there_before_is_dropped(chain: Chain) -> None:
    """A repeated or older step would cut the cache back to its positions; the sequence goes on as if it never came."""
    coordinator, first, _ = chain
    old = coordinator.send_step(first, HIDDEN[:2], span(1, 0, 2))
    new = coordinator.send_step(first, HIDDEN[2:3], span(1, 2, 1))
    for step_id in (old.step_id, new.step_id, 0):
        coordinator.send_step(first, HIDDEN[:1], span(1, 0, 1), step_id=step_id)
    last = coordinator.send_step(first, HIDDEN[3:4], span(1, 3, 1))
    assert [coordinator.collect()[0].step_id for _ in range(3)] == [old.step_id, new.step_id, last.step_id]
    assert first.ping().kv_tokens == 4


def test_a_step_beyond_the_budget_fails_alone(idle: Chain, model_dir: Path) -> None:
    """The failing stage names the numbers, the next one passes it on, other sequences never notice."""
    coordinator, first, second = idle
    endpoint = second.join.data_endpoint
    second.assign(model_dir, 2, 4, stage_index=1, num_stages=2)
    first.assign(model_dir, 0, 2, num_stages=2, next_endpoint=endpoint, kv_budget_tokens=10)
    coordinator.send_step(first, HIDDEN[:6], span(1, 0, 6))
    coordinator.collect()
    coordinator.send_step(first, HIDDEN[:5], span(2, 0, 5), step_id=7050)
    coordinator.send_step(first, HIDDEN[6:7], span(1, 6, 1), step_id=7051)
    failed, _ = coordinator.collect()
    assert isinstance(failed, StepFailed)
    assert (failed.step_id, failed.stage_index, failed.code) == (7050, 0, "kv_budget")
    assert "5 more tokens do not fit: 6 of this stage's KV budget of 10" in failed.text
    assert [timing.stage_index for timing in failed.timings] == [0, 1]
    message, _ = coordinator.collect()
    assert isinstance(message, Step)
    assert first.ping().kv_tokens == second.ping().kv_tokens == 7


def test_later_stages_apply_a_failed_steps_updates_only(chain: Chain) -> None:
    """After a failure in stage 1, both stages hold the same sequences."""
    coordinator, first, second = chain
    coordinator.send_step(first, HIDDEN[:4], span(1, 0, 4))
    coordinator.send_step(first, HIDDEN[:2], ForkSequence(1, 2, 3), span(2, 3, 1), span(1, 9, 1))
    coordinator.collect()
    failed, _ = coordinator.collect()
    assert isinstance(failed, StepFailed)
    assert failed.code == "cache_gap"
    for worker in (first, second):
        pong = worker.ping()
        assert (pong.kv_tokens, pong.num_sequences) == (7, 2)


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"model_path": "/nowhere/at/all"}, "bad_model", "no directory here"),
        ({"fingerprint": "0123"}, "fingerprint_mismatch", "not the checkpoint the coordinator sees"),
        ({"layer_end": 9}, "bad_request", "layers 1-9 were assigned, .* has 4"),
        ({"precision": "fp8"}, "bad_model", "'fp8' is unknown"),
        ({"next_endpoint": "tcp://10.0.0.1:5"}, "unreachable", "without keys"),
    ],
)
def test_an_assignment_that_cannot_be_is_explained(
    idle: Chain, model_dir: Path, changes: dict[str, Any], code: str, words: str
) -> None:
    """A fault in the assignment is told in words, and the worker is idle and usable again."""
    _, first, _ = idle
    reply = first.assign(model_dir, 0, 2, **changes)
    assert isinstance(reply, Failed)
    assert reply.code == code
    with pytest.raises(ValueError, match=words):
        raise ValueError(reply.text)
    assert first.ping().state == "idle"
    assert isinstance(first.assign(model_dir, 0, 2), Ready)


def test_what_an_idle_or_busy_worker_cannot_do(idle: Chain, model_dir: Path) -> None:
    """Inspect needs an assignment; a release needs nothing; another assignment takes the place of the present one."""
    _, first, _ = idle
    assert first.release().freed_bytes >= 0
    assert first.request(Inspect(1, 1, 0, "key", 0)).code == "bad_request"
    assert isinstance(first.assign(model_dir, 0, 1), Ready)
    assert isinstance(first.assign(model_dir, 1, 2), Ready)
    assert first.request(Inspect(1, 1, 0, "key", 0)).code == "bad_request"  # it has the second layer now
    assert first.ping().state == "serving"


def test_the_same_assignment_again_keeps_the_weights(idle: Chain, large_model_dir: Path) -> None:
    """Of another epoch, with the same layers at the same precision: ready at once, in the new epoch."""
    _, first, _ = idle
    fingerprint = Checkpoint(large_model_dir).fingerprint()
    assert isinstance(first.assign(large_model_dir, 0, 4, fingerprint=fingerprint), Ready)
    first.post(first.assignment(large_model_dir, 0, 4, fingerprint=fingerprint, epoch=2, request_id=800))
    again, _ = first.next_message()
    assert isinstance(again, Ready)
    assert (again.epoch, again.request_id) == (2, 800)
    assert first.ping().epoch == 2


def test_answers_while_loading_and_a_release_that_frees(idle: Chain, large_model_dir: Path) -> None:
    """Ping is answered during a load, a load can be given up, and releasing returns the memory."""
    _, first, _ = idle
    before = first.ping().resident_bytes
    # Quantising takes long enough for messages that were sent at once to come in between; reading floats does not.
    first.post(first.assignment(large_model_dir, 0, 4, precision="int4", request_id=899))
    first.post(Ping(900))
    first.post(Release(901, 1))
    pong, _ = first.next_message()
    assert isinstance(pong, Pong)
    assert (pong.request_id, pong.state) == (900, "loading")
    failed, _ = first.next_message()
    assert isinstance(failed, Failed)
    assert (failed.request_id, failed.text) == (899, "released while loading")
    released_early, _ = first.next_message()
    assert isinstance(released_early, Released)
    assert released_early.request_id == 901
    ready = first.assign(large_model_dir, 0, 4)
    assert isinstance(ready, Ready)
    assert ready.weight_bytes > 150e6
    assert ready.resident_bytes > before + 0.9 * ready.weight_bytes
    released = first.release()
    assert released.freed_bytes > 0.9 * ready.weight_bytes
    assert first.ping().resident_bytes < before + 0.2 * ready.weight_bytes
    assert isinstance(first.assign(large_model_dir, 3, 4), Ready)


def test_answers_during_a_long_step(idle: Chain, large_model_dir: Path) -> None:
    """Ping is answered while a step is computed; a release gives the step up."""
    coordinator, first, _ = idle
    first.assign(large_model_dir, 0, 4, kv_budget_tokens=100_000)
    ticks_before = first.cpu_ticks()
    coordinator.send_step(first, torch.zeros(2500, 1024), span(1, 0, 2500))
    wait_until(lambda: first.cpu_ticks() > ticks_before + 20)
    assert first.ping().num_steps == 0
    first.release()
    assert first.ping().state == "idle"
    assert "abandoned: step" in first.log
    assert not coordinator.pull.poll(0)


def test_a_dead_next_hop_blocks_neither_ping_nor_release(idle: Chain, model_dir: Path) -> None:
    """A result that nobody takes is waited with, not died of."""
    coordinator, first, _ = idle
    first.assign(model_dir, 0, 4, next_endpoint=f"ipc://{coordinator.directory}/nobody")
    coordinator.send_step(first, HIDDEN[:2], span(1, 0, 2))
    wait_until(lambda: first.ping().num_steps == 1)
    first.release()
    assert isinstance(first.assign(model_dir, 0, 4), Ready)
    coordinator.send_step(first, HIDDEN[:2], span(1, 0, 2))
    assert isinstance(coordinator.collect()[0], Step)


def test_loopback_tcp_serves_as_well(model_dir: Path) -> None:
    """Joined over tcp://, a worker listens on a loopback port of its own."""
    with fake_coordinator("tcp://127.0.0.1:*") as coordinator:
        worker = coordinator.spawn()
        coordinator.admit(worker)
        assert worker.join.data_endpoint.startswith("tcp://127.0.0.1:")
        assert isinstance(worker.assign(model_dir, 0, 4), Ready)
        step = coordinator.send_step(worker, HIDDEN[:3], span(1, 0, 3))
        message, result = coordinator.collect()
        assert message.step_id == step.step_id
        assert torch.equal(result, in_process(model_dir, 0, 4).run(step, HIDDEN[:3]))
