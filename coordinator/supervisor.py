"""Runs an engine over a cluster and has the cluster mended when a stage is lost: readers of answers see a pause."""

import time
from collections.abc import Callable

from coordinator.engine import Engine, TookPart
from coordinator.errors import CoordinatorError, LaunchError, StageLost, WorkerAbsent
from coordinator.mending import Mendable, Mender


class Supervisor:
    """`step` and `check` do what the engine's and the cluster's do, and recover from the loss of stages.

    A policy without attempts lets the loss through as it is, StageLost.
    """

    def __init__(self, engine: Engine, cluster: Mendable, mender: Mender) -> None:
        self.mender = mender
        self._engine = engine
        self._cluster = cluster
        self._given_up: CoordinatorError | None = None
        self._lost_at_s: float | None = None
        self._plan, self._kv_budgets = cluster.plan, cluster.kv_budgets
        """What the engine, and whoever listens, were told last."""
        self.on_replanned: list[Callable[[], None]] = []
        """Called when the cluster's plan has become another one, or a stage another host's."""

    def step(self) -> TookPart:
        """One step of the engine; nothing where lost stages were brought back, the failed where they cannot be."""
        try:
            if self._given_up is not None:  # somebody asks again: perhaps it was mended by hand
                awaited = self._cluster.awaited()
                if awaited is not None:
                    return self._fail(f"the pipeline is not there: {awaited} is still awaited")
                raise self._still_lost()
            took_part = self._engine.step()
        except StageLost as lost:
            return self._recover(lost)
        if any(timing is not None for _, timing in took_part):
            self.mender.served()
        return took_part

    def check(self) -> None:
        """Look after the stages while there is nothing to compute."""
        if self._given_up is not None and (not isinstance(self._given_up, WorkerAbsent) or self._cluster.awaited()):
            return
        try:
            if self._given_up is not None:
                raise self._still_lost()
            self._cluster.check()
        except StageLost as lost:
            self._recover(lost)

    def waits_for(self) -> str | None:
        """What keeps the stages from serving, in words, and how long already; None while they serve."""
        if self._lost_at_s is None:
            return None
        since = f"for {time.monotonic() - self._lost_at_s:.0f} s already"
        if self._given_up is not None:
            return f"stages that could not be brought back, {since}: {self._given_up}"
        return f"{self._cluster.waits_for()}, {since}"

    def _recover(self, cause: CoordinatorError) -> TookPart:
        self._engine.suspend()
        if not self.mender.policy.max_attempts and not self.mender.policy.replan:
            raise cause
        started_s = time.monotonic()
        self._lost_at_s = self._lost_at_s or started_s
        try:
            epoch = self.mender.mend(cause)
        except (StageLost, LaunchError) as error:
            return self._give_up(error)
        num_running = self._engine.start_over(epoch)
        self._lost_at_s = None
        self._tell_of_changes()
        going_on = f"; {num_running} {'answer goes' if num_running == 1 else 'answers go'} on" if num_running else ""
        self.mender.on_event(f"all stages serve again after {time.monotonic() - started_s:.1f} s{going_on}")
        return []

    def _tell_of_changes(self) -> None:
        """However many attempts lie between, some of which may have failed after the plan had changed."""
        plan, kv_budgets = self._cluster.plan, self._cluster.kv_budgets
        if kv_budgets != self._kv_budgets:
            self._engine.resize(kv_budgets)
        if (plan, kv_budgets) != (self._plan, self._kv_budgets):
            self._plan, self._kv_budgets = plan, kv_budgets
            for tell in self.on_replanned:
                tell()

    def _give_up(self, cause: CoordinatorError) -> TookPart:
        """The requests fail, the coordinator stays: the next request tries again."""
        self._given_up = cause
        failed = self._fail(f"the pipeline could not be brought back: {cause}")
        self.mender.on_event(f"given up: {cause}")
        return failed

    def _still_lost(self) -> StageLost:
        """What was given up is tried again."""
        cause, self._given_up = self._given_up, None
        return StageLost(f"not all stages serve: {cause}")

    def _fail(self, why: str) -> TookPart:
        return [(sequence, None) for sequence in self._engine.fail_all(why)]
