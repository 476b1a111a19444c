"""What tests of faults share: a launch to disturb, the moment at which to do it, and whether all is well afterwards.

    with disturbed_launch(tmp_path) as launch:
        launch.must_survive(PREFILL, FOUR, launch.hit(signal.SIGKILL, 0))

`must_survive` compares every token with an undisturbed run and then looks for whatever the fault may have left.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import coordinator
from coordinator.answer import Answer
from coordinator.chat_model import ChatModel
from coordinator.plan_request import PlanRequest
from coordinator.recovery import RecoveryPolicy
from protocol.client import SamplingParams, TokenPrompt
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

NUM_STAGES = 3
LONG = tuple(5 + n * n % 50 for n in range(200))
SHORT = (5, 9, 12, 7)
LEAST_WAIT_S = 60.0
"""For whatever must happen sooner or later: far more than it takes."""

Fault = Callable[[], None]
Seeds = tuple[int | None, ...]
"""A request each: None is greedy, a number the seed of a sampled one."""
ONE_GREEDY: Seeds = (None,)
ONE_SEEDED: Seeds = (7,)
FOUR: Seeds = (None, None, 7, 8)


@dataclass(frozen=True, slots=True)
class Phase:
    """What is generated, and what tells that the moment for the fault has come."""

    name: str
    prompt: tuple[int, ...]
    num_new: int
    temperature: float
    has_come: Callable[[Answer], bool]


PREFILL = Phase("prefill", LONG, 6, 1.0, lambda answer: 0 < answer.sequence.num_cached < answer.sequence.num_prompt)
DECODE = Phase("decode", SHORT, 24, 1.0, lambda answer: len(answer.sequence.new_ids) >= 3)
SPECULATION = Phase("speculation", SHORT, 64, 0.1, lambda answer: answer.sequence.num_accepted > 0)
"""The small model's likeliest texts run in circles, so that drafts out of them are accepted."""
PHASES = (PREFILL, DECODE, SPECULATION)
_MOST_TRIES = 8
"""A busy machine may find no draft worth its time in a whole answer: then the moment for a fault is still to come."""


@dataclass(slots=True)
class Launch:
    """A running model, what its supervisor said since it was last asked, and every line that its workers wrote."""

    chat_model: ChatModel
    told: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    _wanted: dict[tuple[str, Seeds], list[tuple[int, ...]]] = field(default_factory=dict)

    @property
    def pids(self) -> list[int]:
        """The workers' process ids, by stage."""
        return [join.pid for join in self.chat_model.cluster.join()]

    def hit(self, number: signal.Signals, *stages: int) -> Fault:
        """Send a signal to the workers that these stages (from 0) have at that time."""

        def send() -> None:
            for pid in [self.pids[stage] for stage in stages]:
                os.kill(pid, number)

        return send

    def misses(self, stage: int) -> bool:
        """Whether it is known by now that this stage (from 0) has lost its worker."""
        cluster = self.chat_model.cluster
        return f"stage-{stage + 1}" in cluster._control.roster.lost() or any(
            dead.stage_index == stage for dead in cluster._launcher.dead()
        )

    def silence_s(self, stage: int) -> float:
        """For how long this stage (from 0) has been waited for."""
        return self.chat_model.cluster._control.roster.workers[f"stage-{stage + 1}"].silent_s

    def wanted(self, phase: Phase, seeds: Seeds) -> list[tuple[int, ...]]:
        """What comes when nothing happens."""
        if (phase.name, seeds) not in self._wanted:
            self._wanted[phase.name, seeds] = [finished for finished, _ in self._run(phase, seeds)]
        return self._wanted[phase.name, seeds]

    def must_survive(self, phase: Phase, seeds: Seeds, fault: Fault) -> None:
        """The fault changes no token and leaves nothing behind."""
        wanted = self.wanted(phase, seeds)
        self.told.clear()
        found = self._run(phase, seeds, fault)
        assert [ids for ids, _ in found] == wanted
        if phase is SPECULATION:
            assert any(num_accepted for _, num_accepted in found)
        self.must_be_whole()

    def answers(self, phase: Phase, seeds: Seeds, fault: Fault | None = None, first: int = 0) -> list[Answer]:
        """The answers, finished or failed, the fault having happened when the first of them got so far.

        Each request has a prompt of its own; the first is that of number `first`.
        """
        for _ in range(_MOST_TRIES):
            self.chat_model.engine.forget_prefixes()
            answers = [self._begin(phase, number, seed) for number, seed in enumerate(seeds, first)]
            while not all(answer.sequence.is_finished for answer in answers):
                if fault is not None and any(map(phase.has_come, answers)):
                    fault()
                    fault = None
                self.chat_model.step(answers)
            if fault is None:
                return answers
        raise AssertionError(f"the moment for the fault, in {phase.name}, never came")

    def must_be_whole(self) -> None:
        """One worker a stage and no other, no socket but theirs, nothing cached; a request is served."""
        assert processes_of(self.chat_model.cluster.runtime_dir.path) == set(self.pids)
        own = {f"worker-{pid}" for pid in self.pids}
        assert {path.name for path in self.chat_model.cluster.runtime_dir.path.iterdir()} == {
            *("lock", "control", "return"),
            *own,
        }
        self.chat_model.engine.forget_prefixes()
        until(lambda: all((pong.kv_tokens, pong.num_sequences) == (0, 0) for pong in self.chat_model.cluster.health()))
        assert not any("/dev/shm/" in Path(f"/proc/{pid}/maps").read_text() for pid in self.pids)
        assert [ids for ids, _ in self._run(DECODE, ONE_GREEDY)] == self.wanted(DECODE, ONE_GREEDY)

    def _run(self, phase: Phase, seeds: Seeds, fault: Fault | None = None) -> list[tuple[tuple[int, ...], int]]:
        """Token ids of each answer, and how many of them were drafted and accepted."""
        answers = self.answers(phase, seeds, fault)
        for answer in answers:
            assert answer.sequence.error is None, answer.sequence.error
        return [(answer.close()[1].token_ids, answer.sequence.num_accepted) for answer in answers]

    def _begin(self, phase: Phase, number: int, seed: int | None) -> Answer:
        is_greedy = seed is None
        sampling = SamplingParams(phase.temperature, 0, 1.0, 0.0, 1.0, seed, (), phase.num_new, True, is_greedy)
        return self.chat_model.begin(TokenPrompt((*phase.prompt, 5 + number)), sampling)


@contextmanager
def disturbed_launch(
    directory: Path,
    *worker: str,
    plan: PlanRequest | None = None,
    recovery: RecoveryPolicy | None = None,
    shape: Mapping[str, object] | None = None,
    **options: object,
) -> Iterator[Launch]:
    """A small model over three stages, each loss a trouble of its own; what is left of it when it closes is checked.

    `shape`: keys of the model's config that are not as usual.
    `worker`: run the workers through `tests.end_to_end.faulty_worker` with these arguments.
    """
    model_dir = directory / "model"
    if not model_dir.exists():
        write_checkpoint(model_dir, {**CAUSAL, "num_layers": 6, "seq_length": 4096, **(shape or {})})
    plan = plan or PlanRequest(num_stages=NUM_STAGES, num_threads=1, prefill_chunk=16)
    policy = recovery or RecoveryPolicy(settled_s=0.0)
    lines: list[str] = []
    with faulty_workers(*worker):
        chat_model = coordinator.launch(model_dir, plan, on_log=lines.append, recovery=policy, **options)  # type: ignore[arg-type]
        with chat_model:
            launch = Launch(chat_model, lines=lines)
            chat_model.supervisor.mender.on_event = launch.told.append
            yield launch
    runtime_dir = chat_model.cluster.runtime_dir.path
    assert processes_of(runtime_dir) == set()
    assert not runtime_dir.exists()


@contextmanager
def faulty_workers(*arguments: str) -> Iterator[None]:
    """Workers that are started inside the block are `tests.end_to_end.faulty_worker`s, if there are arguments."""
    if not arguments:
        yield
        return
    command = (sys.executable, "-P", "-m", "tests.end_to_end.faulty_worker", *arguments)
    with patch("coordinator.launcher.worker_command", lambda: command):
        yield


def processes_of(runtime_dir: Path) -> set[int]:
    """All living processes that were told to join there, whoever their parent is."""
    found = set()
    for directory in Path("/proc").iterdir():
        try:
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"ipc://{runtime_dir}/control".encode() in arguments:
            found.add(int(directory.name))
    return found


def until(is_so: Callable[[], bool], within_s: float = LEAST_WAIT_S) -> None:
    """Wait for something that must come."""
    give_up_at_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < give_up_at_s, f"did not come within {within_s:g} s"
        time.sleep(0.05)
