"""What to do when a stage is lost: pure decisions, no clock, no processes."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.errors import CoordinatorError, StageLost, WorkerDied

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
