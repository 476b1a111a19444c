"""What to do when a stage is lost: pure decisions, no clock, no processes."""

from dataclasses import dataclass

from coordinator.errors import CoordinatorError, StageLost, WorkerDied

RETRYABLE = (StageLost, WorkerDied)
"""Causes that another attempt may mend. A worker that cannot load its layers will not be able to next time."""


@dataclass(frozen=True, slots=True)
class RecoveryPolicy:
    """At most `max_attempts` for one loss, the first at once, then after `first_delay_s`, doubled up to `most_delay_s`.

    A loss within `settled_s` seconds after the last recovery belongs to the same trouble and counts on. With `replan`
    the layers of a stage that does not come back go to the others, if those have room.
    """

    max_attempts: int = 5
    first_delay_s: float = 0.5
    most_delay_s: float = 10.0
    settled_s: float = 30.0
    replan: bool = False


DEFAULT_RECOVERY = RecoveryPolicy()
LEAST_PATIENCE_S = 30.0
PATIENCE_FACTOR = 10.0
"""A step may take so many times as long as the slowest so far did for each token, before it counts as stuck."""


class Patience:
    """How long to wait for steps that are under way, from how long steps took until now."""

    def __init__(self) -> None:
        self._slowest_s = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens came back so long after it was sent."""
        if num_tokens:
            self._slowest_s = max(self._slowest_s, seconds / num_tokens)

    def limit_s(self, num_tokens: int) -> float | None:
        """Seconds without any outcome after which `num_tokens` under way are not to be expected; None: no idea yet."""
        if self._slowest_s == 0.0:
            return None
        return max(LEAST_PATIENCE_S, PATIENCE_FACTOR * self._slowest_s * num_tokens)


class Recovery:
    """How often it was tried for the present trouble."""

    def __init__(self, policy: RecoveryPolicy) -> None:
        self.policy = policy
        self.num_attempts = 0
        self._recovered_at_s: float | None = None

    def next_delay_s(self, cause: CoordinatorError, now_s: float) -> float | None:
        """Seconds to wait before the next attempt; None to give up."""
        policy = self.policy
        if self._recovered_at_s is not None and now_s - self._recovered_at_s > policy.settled_s:
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

    def gave_up(self) -> None:
        """Whoever asks next starts with all attempts."""
        self.num_attempts = 0
        self._recovered_at_s = None
