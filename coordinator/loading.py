"""The stages of a cluster while they load, side by side: how far each is, and which could not."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from coordinator.cluster_settings import ProgressSink, StageProgress
from coordinator.errors import LaunchError, StageLost, WorkerDied
from coordinator.reply import Reply, expect
from protocol.control import Progress, Ready

_POLL_S = 0.1


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
        self._num_layers: Sequence[int] = ()
        self._done: dict[int, int] = {}
        self._ready: dict[int, Ready] = {}

    def begin(self, requests: Sequence[Future[Reply]], num_layers: Sequence[int]) -> None:
        """All stages were assigned so many layers each; `requests` hold their answers."""
        self._requests, self._num_layers = requests, num_layers
        self._done, self._ready = {}, {}

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to wait for."""
        return bool(self._requests)

    def wait(self, check: Callable[[], None]) -> tuple[Ready, ...]:
        """Block until all are ready; `check` is called every 0.1 s and may raise.

        Raises:
            LaunchError: one cannot hold its layers. WorkerDied: `check` raised StageLost.
        """
        pending = set(self._requests)
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for index in sorted(self._requests.index(future) for future in done):
                self._take(index, self._requests[index])
            try:
                check()
            except StageLost as error:
                raise WorkerDied(str(error).replace("while serving", "while loading")) from None
        return tuple(self._ready[index] for index in range(len(self._requests)))

    def note(self, index: int, progress: Progress) -> None:
        """A stage has said how far it is."""
        self._done[index] = progress.layers_done
        self._report(StageProgress(index, progress.layers_done, progress.layers_total, progress.weight_bytes))

    def waits_for(self) -> str | None:
        """The stages that are not ready yet, and how far they are, in words; None when all are."""
        waiting = [index for index, request in enumerate(self._requests) if not request.done()]
        parts = [f"{self._name(i)} ({self._done.get(i, 0)} of {self._num_layers[i]} layers)" for i in waiting]
        return f"{', '.join(parts)} to load" if parts else None

    def _take(self, index: int, future: Future[Reply]) -> None:
        try:
            message, _ = expect(future.result(0), Ready, self._name(index))
        except LaunchError:
            self.could_not.add(index)
            raise
        assert isinstance(message, Ready)
        self._ready[index] = message
        num_layers = self._num_layers[index]
        self._report(StageProgress(index, num_layers, num_layers, message.weight_bytes, message))

    def _report(self, progress: StageProgress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)
