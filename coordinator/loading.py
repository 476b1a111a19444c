"""The stages of a cluster while they load, side by side: how far each is, and which could not."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from coordinator.cluster_settings import ProgressSink, StageProgress
from coordinator.errors import LaunchError, StageLost, WorkerDied
from coordinator.plan import StagePlan
from coordinator.recovery import LoadPatience
from coordinator.reply import Reply, expect
from protocol.control import Pong, Progress, Ready
from protocol.records import with_changes

_POLL_S = 0.1
ANSWER_S = 10.0
"""An answer is on its way before a heartbeat says that the stage serves; one that does not come by then got lost."""


class Loading:
    """From an assignment to stages that are ready. `note` is called by the control plane's thread.

    `name` says which stage one is, in words. `on_progress` hears how far the stages are, until it is taken away.
    """

    def __init__(self, name: Callable[[int], str], on_progress: ProgressSink | None) -> None:
        self.on_progress = on_progress
        self.could_not: set[int] = set()
        """The stages that said that they cannot hold their layers."""
        self._name = name
        self._requests: Sequence[Future[Reply]] = ()
        self._stages: Sequence[StagePlan] = ()
        self._epoch = 0
        self._began_at_s = 0.0
        self._done: dict[int, int] = {}
        self._patience: dict[int, LoadPatience] = {}
        self._ready: dict[int, Ready] = {}
        self._unanswered_s: dict[int, float] = {}

    def begin(self, requests: Sequence[Future[Reply]], stages: Sequence[StagePlan], epoch: int) -> None:
        """All stages were assigned their layers in this epoch; `requests` hold their answers."""
        self._requests, self._stages, self._epoch = requests, stages, epoch
        self._began_at_s = time.monotonic()
        self._done, self._ready, self._unanswered_s = {}, {}, {}
        self._patience = {index: LoadPatience() for index in range(len(requests))}

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._requests)

    def wait(self, check: Callable[[float], None]) -> tuple[Ready, ...]:
        """Block until all are ready; `check` is called every 0.1 s with the time waited, and may raise.

        Raises:
            LaunchError: one cannot hold its layers. WorkerDied: `check` raised StageLost.
        """
        pending = set(self._requests)
        while pending:
            started_s = time.monotonic()
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for index in sorted(self._requests.index(future) for future in done):
                self._take(index, self._requests[index])
            try:
                check(min(_POLL_S, time.monotonic() - started_s))
            except StageLost as error:
                text = str(error).replace("while serving", "while loading")
                raise WorkerDied(text, by_sigkill=error.by_sigkill) from None
        return tuple(self._ready[index] for index in range(len(self._requests)))

    def note(self, index: int, progress: Progress) -> None:
        """A stage has said how far it is, which counts only where it has come further: once for each of its layers."""
        if index >= len(self._stages):
            return  # quicker than whoever is told of its assignment
        num_layers, before = self._stages[index].num_layers, self._done.get(index, -1)
        expected = (self._epoch, num_layers)
        if (progress.epoch, progress.layers_total) != expected or not before < progress.layers_done <= num_layers:
            return
        self._done[index] = progress.layers_done
        self._report(StageProgress(index, progress.layers_done, progress.layers_total, progress.weight_bytes))

    def stuck(self, waited_s: float, pongs: Mapping[int, Pong]) -> dict[int, str]:
        """The stages that answer but do not load any more, and what they have not done; time passes for all others.

        `pongs` are the latest ones, by stage.
        """
        found = {}
        for index, patience in self._patience.items():
            if self._requests[index].done():
                continue
            pong = pongs.get(index)
            serves = pong is not None and (pong.state, pong.epoch) == ("serving", self._epoch)
            self._unanswered_s[index] = self._unanswered_s.get(index, 0.0) + waited_s if serves else 0.0
            if self._unanswered_s[index] > ANSWER_S:
                found[index] = f"says that it serves, and has not answered its assignment for {ANSWER_S:g} s since"
                continue
            num_bytes = () if pong is None else (pong.moved_bytes, pong.resident_bytes)
            patience.wait(waited_s, self._done.get(index, 0), num_bytes)
            if patience.idle_s > patience.limit_s:
                layer = self._stages[index].layer_start + patience.num_layers + 1
                found[index] = (
                    f"hangs in layer {layer}: it answers, but has neither read nor done anything for "
                    f"{patience.idle_s:.0f} s; look at the disk, or the network, that its host has the model on"
                )
        return found

    def waits_for(self) -> str | None:
        """The stages that are not ready yet, and how far they are, in words; None when all are."""
        waiting = [index for index, request in enumerate(self._requests) if not request.done()]
        parts = [f"{self._name(i)} ({self._done.get(i, 0)} of {self._stages[i].num_layers} layers)" for i in waiting]
        return f"{', '.join(parts)} to load" if parts else None

    def _take(self, index: int, future: Future[Reply]) -> None:
        try:
            message, _ = expect(future.result(0), Ready, self._name(index))
        except LaunchError:
            self.could_not.add(index)
            raise
        assert isinstance(message, Ready)
        if message.epoch != self._epoch:
            self.could_not.add(index)
            raise LaunchError(f"{self._name(index)} is ready in epoch {message.epoch}, {self._epoch} was assigned")
        took_s = time.monotonic() - self._began_at_s
        message = self._ready[index] = with_changes(message, load_s=min(message.load_s, took_s))
        num_layers = self._stages[index].num_layers
        self._report(StageProgress(index, num_layers, num_layers, message.weight_bytes, message))

    def _report(self, progress: StageProgress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)
