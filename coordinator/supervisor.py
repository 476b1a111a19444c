"""Runs an engine over a cluster and mends the cluster when a stage is lost: whoever reads an answer sees a pause."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

from coordinator.engine import Engine, TookPart
from coordinator.errors import CoordinatorError, LaunchError, StageLost, StepStuck
from coordinator.recovery import Recovery, RecoveryPolicy

_log = logging.getLogger(__name__)


class Mendable(Protocol):
    """What `coordinator.cluster.Cluster` is to a supervisor."""

    def check(self) -> None:
        """Raises StageLost when a worker has died, left or fallen silent."""

    def recover(self, is_stuck: bool) -> int:
        """Bring all stages up again; the new epoch. Raises StageLost or LaunchError.

        `is_stuck`: nobody is known to be lost, but a step does not come back.
        """


class Supervisor:
    """`step` and `check` do what the engine's and the cluster's do, and recover from the loss of stages.

    `on_event` is told, in words for people, what was lost and what became of it. A policy without attempts lets the
    loss through as it is, StageLost.
    """

    def __init__(
        self,
        engine: Engine,
        cluster: Mendable,
        policy: RecoveryPolicy,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.on_event: Callable[[str], None] = _log.warning
        self._engine = engine
        self._cluster = cluster
        self._recovery = Recovery(policy)
        self._sleep = sleep
        self._has_given_up = False

    def step(self) -> TookPart:
        """One step of the engine; nothing where lost stages were brought back, the failed where they cannot be."""
        try:
            if self._has_given_up:  # somebody asks again: perhaps it was mended by hand
                self._has_given_up = False
                self._cluster.check()
            return self._engine.step()
        except StageLost as lost:
            return self._recover(lost)

    def check(self) -> None:
        """Look after the stages while there is nothing to compute."""
        if self._has_given_up:
            return
        try:
            self._cluster.check()
        except StageLost as lost:
            self._recover(lost)

    def _recover(self, cause: CoordinatorError) -> TookPart:
        if not self._recovery.policy.max_attempts:
            raise cause
        started_s = time.monotonic()
        while True:
            delay_s = self._recovery.next_delay_s(cause, time.monotonic())
            if delay_s is None:
                return self._give_up(cause)
            attempts = f"attempt {self._recovery.num_attempts} of {self._recovery.policy.max_attempts}"
            self.on_event(f"{cause}\nstarting it again ({attempts})")
            self._sleep(delay_s)
            try:
                epoch = self._cluster.recover(isinstance(cause, StepStuck))
                break
            except (StageLost, LaunchError) as error:
                cause = error
        num_running = self._engine.start_over(epoch)
        self._recovery.recovered(time.monotonic())
        going_on = f"; {num_running} {'answer goes' if num_running == 1 else 'answers go'} on" if num_running else ""
        self.on_event(f"all stages serve again after {time.monotonic() - started_s:.1f} s{going_on}")
        return []

    def _give_up(self, cause: CoordinatorError) -> TookPart:
        """The requests fail, the coordinator stays: the next request tries again."""
        self._has_given_up = True
        self._recovery.gave_up()
        failed = self._engine.fail_all(f"the pipeline could not be brought back: {cause}")
        self.on_event(f"given up: {cause}")
        return [(sequence, None) for sequence in failed]
