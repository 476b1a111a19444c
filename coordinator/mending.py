"""Brings lost stages back: at once, then again with growing delays, as often as a policy allows."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from coordinator.errors import CoordinatorError, LaunchError, ReplanError, StageLost, StepStuck, WorkerDied
from coordinator.plan import Plan
from coordinator.recovery import MemoryKills, Recovery, RecoveryPolicy
from coordinator.replanning import Remaining, Replanned

Choose = Callable[[Plan, Sequence[Remaining]], Replanned]
_SLICE_S = 0.1
_log = logging.getLogger(__name__)


class Mendable(Protocol):
    """What `coordinator.cluster.Cluster` is to a mender."""

    plan: Plan
    """As it is now."""
    meanwhile: Callable[[], None]
    """To be called about every 0.1 s by whoever waits before the next attempt."""

    def join(self) -> object:
        """Wait until every stage has a worker. Raises WorkerDied or LaunchError."""

    def load(self) -> object:
        """Wait until all stages serve. Raises WorkerDied or LaunchError."""

    def check(self) -> None:
        """Raises StageLost when a worker has died, left or fallen silent."""

    def replace_lost(self, is_stuck: bool) -> None:
        """Start workers in the place of those that were lost; `is_stuck` as for `recover`."""

    def leave_out_lost(self, choose: Choose) -> tuple[str, ...]:
        """Plan without the stages that are lost; what went where. Raises ReplanError: it is as it was."""

    @property
    def kv_budgets(self) -> tuple[int, ...]:
        """How many tokens each stage may cache."""

    @property
    def num_stages(self) -> int:
        """How many there are now."""

    @property
    def epoch(self) -> int:
        """Of the latest assignment."""

    def recover(self, is_stuck: bool) -> int:
        """Bring all stages up again; the new epoch. Raises StageLost or LaunchError.

        `is_stuck`: nobody is known to be lost, but a step does not come back.
        """

    def suspect(self, what: str) -> str:
        """What was noticed of a step that does not come back, with where that seems to be."""

    def awaited(self) -> str | None:
        """Whose return alone could help; None: nobody's, as far as is known."""

    def next_try(self, is_stuck: bool) -> str:
        """What `recover` is going to do about those that are lost, in words."""

    def waits_for(self) -> str:
        """What stages that do not serve yet are waited for, in words."""


class Mender:
    """Every method either has all stages where they are wanted in the end, or raises what kept them from it.

    `on_event` is told, in words for people, what was lost and what is done about it. `choose` is asked for another
    plan when a stage does not come back, if the policy says so.
    """

    def __init__(
        self,
        cluster: Mendable,
        policy: RecoveryPolicy,
        on_event: Callable[[str], None] = _log.warning,
        *,
        choose: Choose | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self.on_event = on_event
        self.policy = policy
        self._cluster = cluster
        self._recovery = Recovery(policy)
        self._choose = choose
        self._sleep = sleep or self._pause

    def join(self) -> None:
        """Wait for the workers of a new cluster. One that was killed before it joined is started again.

        One that ended by itself would do so again. Raises LaunchError.
        """
        while True:
            try:
                self._cluster.join()
                return
            except WorkerDied as died:
                if not died.was_killed or not self._may_try_again(died, False):
                    raise
                self._cluster.replace_lost(False)

    def load(self, kills: MemoryKills, memory: Sequence[str] = ()) -> None:
        """Wait until the stages of a new cluster serve. Raises LaunchError.

        One that `kills` says was killed for want of memory is not started again; `memory` tells needs and haves.
        """

        def hopeless(cause: CoordinatorError) -> CoordinatorError | None:
            return WorkerDied("\n".join([str(cause), *memory])) if kills.explain(cause) else None

        try:
            self._cluster.load()
        except (WorkerDied, StageLost) as lost:
            epoch = self.mend(lost, hopeless)
            self.on_event(f"all stages serve, in epoch {epoch}")

    def mend(
        self, cause: CoordinatorError, hopeless: Callable[[CoordinatorError], CoordinatorError | None] = lambda _: None
    ) -> int:
        """Bring all stages up again after this; the new epoch. Raises the last cause when nothing is left to try.

        `hopeless` says of a cause that no attempt will mend, in better words; None of others.
        """
        while True:
            is_stuck = isinstance(cause, StepStuck)
            if is_stuck:
                cause = StepStuck(self._cluster.suspect(str(cause)))
            final = hopeless(cause)
            if final is not None or not self._may_try_again(cause, is_stuck):
                cause = final or cause
                self._recovery.gave_up()
                self._replan(cause)
                is_stuck = False
            try:
                epoch = self._cluster.recover(is_stuck)
            except (StageLost, LaunchError) as error:
                cause = error
                continue
            self._recovery.recovered(time.monotonic())
            return epoch

    def served(self) -> None:
        """An outcome has come back: what was mended works."""
        self._recovery.served(time.monotonic())

    def _replan(self, cause: CoordinatorError) -> None:
        """Let the stages that are left have all layers. Raises the cause, with a word on that, if it cannot be."""
        if not self.policy.replan or self._choose is None:
            if self._cluster.num_stages == 1:
                raise cause
            raise type(cause)(f"{cause}\n(with --replan, its layers go to the other stages if those have room)")
        try:
            lines = self._cluster.leave_out_lost(self._choose)
        except ReplanError as error:
            raise type(cause)(f"{cause}\n--replan does not help: {error}") from None
        self.on_event("\n  ".join([f"{cause}\ngiven up; its layers go to the other stages:", *lines]))

    def _pause(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            self._cluster.meanwhile()
            time.sleep(min(left_s, _SLICE_S))

    def _may_try_again(self, cause: CoordinatorError, is_stuck: bool) -> bool:
        """Says so and waits as long as is due, if there is another attempt."""
        delay_s = self._recovery.next_delay_s(cause)
        if delay_s is None:
            return False
        attempts = f"attempt {self._recovery.num_attempts} of {self.policy.max_attempts}"
        self.on_event(f"{cause}\n{self._cluster.next_try(is_stuck)} ({attempts})")
        self._sleep(delay_s)
        return True
