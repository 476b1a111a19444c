"""What to do when a stage is lost: pure decisions, no clock, no processes."""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from coordinator.errors import CoordinatorError, StageLost, WorkerDied
from coordinator.plan import Plan

RETRYABLE = (StageLost, WorkerDied)
"""Causes that another attempt may mend. A worker that cannot load its layers will not be able to next time."""


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """At most `max_attempts` for one loss, the first at once, then after `first_delay_s`, doubled up to `most_delay_s`.

    What is lost belongs to the same trouble as before, and counts on, until an outcome has come back more than
    `settled_s` seconds after the last recovery. With `replan` the layers of a stage that does not come back go to the
    others, if those have room.
    """

    max_attempts: int = 5
    first_delay_s: float = 0.5
    most_delay_s: float = 10.0
    settled_s: float = 30.0
    replan: bool = False


DEFAULT_RECOVERY = RecoveryPolicy()
LEAST_PATIENCE_S = 30.0
PATIENCE_FACTOR = 10.0
"""A step may take so many times as long as such steps lately did, before it counts as stuck,"""
MOST_EXTRA_S = 900.0
"""but no more than so much longer."""
FIRST_PATIENCE_S, FIRST_TOKEN_S = 900.0, 10.0
"""The first of its kind may take so long, or so long for each token: weights are paged in, kernels are compiled."""
LEAST_LOADING_S = 120.0
"""A stage that loads may show no sign of life for so long, although its worker answers,"""
LOADING_FACTOR = 5.0
"""or so many times as long as its slowest layer took."""
SIGN_BYTES = 2**20
"""What is read, written, or held more or less: a worker that only answers pings stays far below it."""
LATEST = 20
"""So many steps of a kind tell how long one takes."""
SIMILAR = 4
"""Steps with fewer tokens than one in so many tell little of a larger one."""


class Patience:
    """How long to wait for steps that are under way, from how long the latest ones of their kinds took."""

    def __init__(self) -> None:
        self._latest: dict[str, deque[tuple[int, float]]] = {}

    def observe(self, kind: str, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens came back so long after it was sent."""
        self._latest.setdefault(kind, deque(maxlen=LATEST)).append((num_tokens, seconds))

    def limit_s(self, under_way: Iterable[tuple[str, int]]) -> float:
        """Seconds without any outcome after which none is to be expected of these steps: kinds, and tokens in each."""
        return max((self._of_one_s(kind, num_tokens) for kind, num_tokens in under_way), default=LEAST_PATIENCE_S)

    def _of_one_s(self, kind: str, num_tokens: int) -> float:
        """By the second slowest of the latest: one that was held up once makes nobody wait longer."""
        latest = self._latest.get(kind)
        if not latest:
            return max(FIRST_PATIENCE_S, FIRST_TOKEN_S * num_tokens)
        similar = [step for step in latest if SIMILAR * step[0] >= num_tokens] or latest
        took_s = sorted(seconds * max(1.0, num_tokens / max(1, tokens)) for tokens, seconds in similar)[-2:][0]
        return max(LEAST_PATIENCE_S, min(PATIENCE_FACTOR * took_s, took_s + MOST_EXTRA_S))


def next_try(plan: Plan, lost: Collection[int], patience_s: float) -> str:
    """What is going to be done about the stages that are lost, in words.

    Workers of this host are started again; others come back by themselves or not, and are awaited for so long.
    """
    others = [index for index in sorted(lost) if plan.stages[index].host is not None]
    own = [index for index in sorted(lost) if index not in others]
    names = ", ".join(f"stage {index + 1}" for index in own) if others or len(own) > 1 else "it"
    parts = [f"starting {names} again"] if own else []
    if others:
        names = ", ".join(f"stage {index + 1}" for index in others) if own or len(others) > 1 else "it"
        wait = f"waiting {patience_s:g} s at most for {names} to come back"
        parts.append(wait if patience_s else f"looking for a spare worker in the place of {names}")
    return ", ".join(parts) or "trying again"


class MemoryKills:
    """Whether workers of a launch that starts are killed for want of memory, which another attempt would not mend.

    `count` says how many processes the system has killed for that so far, if it can. Where it has killed none, a
    worker killed once may have been by somebody; one that is killed again was hardly.
    """

    def __init__(self, count: Callable[[], int | None]) -> None:
        self._count = count
        self._before = count()
        self._num_seen = 0

    def explain(self, cause: CoordinatorError) -> bool:
        """Whether memory is the likely reason of this loss."""
        if not isinstance(cause, WorkerDied) or not cause.by_sigkill:
            return False
        self._num_seen += 1
        now = self._count()
        is_counted = now is not None and self._before is not None and now > self._before
        return is_counted or self._num_seen > 1


class LoadPatience:
    """Whether a stage still loads: it counts as stuck when nothing has happened for far longer than its layers took."""

    def __init__(self) -> None:
        self.num_layers = 0
        self.idle_s = 0.0
        """Time waited since the last sign: a layer, or as many bytes as a disk must move now and then."""
        self._slowest_s = 0.0
        self._of_layer_s = 0.0
        self._num_bytes: tuple[int, ...] = ()

    def wait(self, seconds: float, num_layers: int, num_bytes: tuple[int, ...]) -> None:
        """So much time has passed; so many layers are done by now, and counters of what was moved stand there."""
        self._of_layer_s += seconds
        self.idle_s += seconds
        if num_layers != self.num_layers:
            self._slowest_s = max(self._slowest_s, self._of_layer_s)
            self.num_layers, self._of_layer_s, self.idle_s = num_layers, 0.0, 0.0
        moved = [abs(now - before) for now, before in zip(num_bytes, self._num_bytes, strict=False)]
        if max(moved, default=SIGN_BYTES) >= SIGN_BYTES:
            self._num_bytes = num_bytes
            self.idle_s = 0.0 if moved else self.idle_s

    @property
    def limit_s(self) -> float:
        """How long nothing may happen."""
        return max(LEAST_LOADING_S, LOADING_FACTOR * self._slowest_s)


class Recovery:
    """How often it was tried for the present trouble."""

    def __init__(self, policy: RecoveryPolicy) -> None:
        self.policy = policy
        self.num_attempts = 0
        self._recovered_at_s: float | None = None
        self._served_at_s = -math.inf

    def next_delay_s(self, cause: CoordinatorError) -> float | None:
        """Seconds to wait before the next attempt; None to give up."""
        policy = self.policy
        if self._recovered_at_s is not None and self._served_at_s - self._recovered_at_s > policy.settled_s:
            self.num_attempts = 0
        self._recovered_at_s = None
        if not isinstance(cause, RETRYABLE) or self.num_attempts >= policy.max_attempts:
            return None
        self.num_attempts += 1
        if self.num_attempts == 1:
            return 0.0
        return min(policy.most_delay_s, policy.first_delay_s * 2.0 ** (self.num_attempts - 2))

    def recovered(self, now_s: float) -> None:
        """All stages serve again."""
        self._recovered_at_s = now_s

    def served(self, now_s: float) -> None:
        """An outcome has come back. Time that merely passes tells nothing: a step that sticks takes long, too."""
        self._served_at_s = now_s

    def gave_up(self) -> None:
        """Whoever asks next starts with all attempts."""
        self.num_attempts = 0
        self._recovered_at_s = None
