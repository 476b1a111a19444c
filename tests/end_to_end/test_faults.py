"""Workers that die, stop or stall while they serve: every answer ends with exactly the tokens it would have had."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import coordinator
from coordinator.chat_model import ChatModel
from coordinator.plan_request import PlanRequest
from coordinator.recovery import RecoveryPolicy
from protocol.client import SamplingParams, TokenPrompt
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow

NUM_STAGES = 3
NUM_NEW = 24
LONG = tuple(5 + n * n % 50 for n in range(200))
SHORT = (5, 9, 12, 7)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatModel]:
    """One model for all faults: each finds it as the recovery before left it."""
    model_dir = tmp_path_factory.mktemp("model")
    write_checkpoint(model_dir, {**CAUSAL, "seq_length": 4096})
    plan = PlanRequest(num_stages=NUM_STAGES, num_threads=1, prefill_chunk=16)
    policy = RecoveryPolicy(settled_s=0.0)
    with coordinator.launch(model_dir, plan, on_log=print, recovery=policy) as chat_model:
        yield chat_model
        pids = [join.pid for join in chat_model.cluster.join()]
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def tokens(
    chat_model: ChatModel,
    num_answers: int,
    prompt: tuple[int, ...],
    seed: int | None,
    fault: Callable[[], None] = lambda: None,
    after_steps: int = 0,
) -> list[tuple[int, ...]]:
    """The answers to several prompts at once, `fault` happening in between; the kept prefixes are dropped before."""
    chat_model.engine.forget_prefixes()
    is_greedy = seed is None
    answers = []
    for number in range(num_answers):
        sampling = SamplingParams(
            1.0, 0, 1.0, 0.0, 1.0, None if is_greedy else seed + number, (), NUM_NEW, True, is_greedy
        )  # type: ignore[operator]
        answers.append(chat_model.begin(TokenPrompt((*prompt, 5 + number)), sampling))
    steps = 0
    while not all(answer.sequence.is_finished for answer in answers):
        if steps == after_steps:
            fault()
        chat_model.step(answers)
        steps += 1
    assert steps > after_steps, "the fault came too late"
    for answer in answers:
        assert answer.sequence.error is None
    return [answer.close()[1].token_ids for answer in answers]


def hit(chat_model: ChatModel, stages: tuple[int, ...], number: signal.Signals) -> Callable[[], None]:
    def send() -> None:
        for stage in stages:
            os.kill(chat_model.cluster.join()[stage].pid, number)

    return send


@pytest.mark.parametrize("stages", [(0,), (1,), (2,), (0, 2)], ids=lambda stages: "-".join(str(s + 1) for s in stages))
@pytest.mark.parametrize(
    ("num_answers", "prompt", "seed", "after_steps"),
    [(1, LONG, None, 4), (4, SHORT, 7, 6)],
    ids=["one answer, in its prompt", "four answers, seeded"],
)
def test_killed_workers_change_no_token(
    chat_model: ChatModel,
    stages: tuple[int, ...],
    num_answers: int,
    prompt: tuple[int, ...],
    seed: int | None,
    after_steps: int,
) -> None:
    """Each stage by itself and two at once, while a prompt is fed and while answers are decoded."""
    wanted = tokens(chat_model, num_answers, prompt, seed)
    told: list[str] = []
    chat_model.supervisor.on_event = told.append
    found = tokens(chat_model, num_answers, prompt, seed, hit(chat_model, stages, signal.SIGKILL), after_steps)
    assert found == wanted
    assert f"stage {stages[0] + 1}" in told[0] or f"stage {stages[-1] + 1}" in told[0]
    assert "SIGKILL" in told[0] and "all stages serve again" in told[-1]


def test_a_stopped_worker_is_replaced_and_never_heard_again(chat_model: ChatModel) -> None:
    """SIGSTOP is noticed by its silence within seconds; the stopped process is gone afterwards."""
    wanted = tokens(chat_model, 2, SHORT, None)
    pid = chat_model.cluster.join()[1].pid
    told: list[str] = []
    chat_model.supervisor.on_event = told.append
    assert tokens(chat_model, 2, SHORT, None, hit(chat_model, (1,), signal.SIGSTOP), 5) == wanted
    assert "stage-2" in told[0] and "silent" in told[0]
    assert not Path(f"/proc/{pid}").exists()


def test_a_slow_stage_is_waited_for(chat_model: ChatModel) -> None:
    """A stage that stalls for a second is not replaced; nobody is told anything."""
    wanted = tokens(chat_model, 2, SHORT, 3)
    pid = chat_model.cluster.join()[2].pid
    told: list[str] = []
    chat_model.supervisor.on_event = told.append

    def stall() -> None:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(1.0, os.kill, (pid, signal.SIGCONT)).start()

    assert tokens(chat_model, 2, SHORT, 3, stall, 5) == wanted
    assert told == []
    assert chat_model.cluster.join()[2].pid == pid


def test_a_worker_killed_while_nobody_asks_is_replaced(chat_model: ChatModel) -> None:
    """What looks after an idle launch finds and mends it; the next answer is as ever."""
    wanted = tokens(chat_model, 1, SHORT, None)
    hit(chat_model, (0,), signal.SIGKILL)()
    told: list[str] = []
    chat_model.supervisor.on_event = told.append
    give_up_at_s = time.monotonic() + 60
    while not told and time.monotonic() < give_up_at_s:
        chat_model.supervisor.check()
        time.sleep(0.05)
    assert "all stages serve again" in told[-1]
    assert tokens(chat_model, 1, SHORT, None) == wanted


def test_a_worker_killed_again_while_it_comes_back_is_tried_again(chat_model: ChatModel) -> None:
    """The replacement dies, too, while it starts: another attempt brings it back."""
    wanted = tokens(chat_model, 1, SHORT, None)
    told: list[str] = []

    def kill_the_next_one(text: str) -> None:
        told.append(text)
        if len(told) == 1:

            def strike() -> None:
                launcher = chat_model.cluster._launcher
                old = launcher._workers[1]._process.pid
                while (pid := launcher._workers[1]._process.pid) == old:
                    time.sleep(0.01)
                os.kill(pid, signal.SIGKILL)

            threading.Thread(target=strike).start()

    chat_model.supervisor.on_event = kill_the_next_one
    assert tokens(chat_model, 1, SHORT, None, hit(chat_model, (1,), signal.SIGKILL), 5) == wanted
    assert any("attempt 2" in text for text in told)


def test_nothing_stays_cached_after_all_that(chat_model: ChatModel) -> None:
    """No stage, old or new, holds a token of a sequence that has ended."""
    tokens(chat_model, 2, SHORT, None)
    chat_model.engine.forget_prefixes()
    give_up_at_s = time.monotonic() + 20
    while any(pong.kv_tokens for pong in chat_model.cluster.health()) and time.monotonic() < give_up_at_s:
        time.sleep(0.1)
    assert [(pong.kv_tokens, pong.num_sequences) for pong in chat_model.cluster.health()] == [(0, 0)] * NUM_STAGES
