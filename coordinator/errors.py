"""What can go wrong between a user's wish and an answer.

    CoordinatorError              exit code 1
    ├── UsageError                exit code 2: the request itself cannot be meant; nothing was started
    │   ├── PlanError             the plan has faults; all of them are listed
    │   ├── CompareError          a file to compare is missing or unreadable
    │   ├── PromptFileError       lines of a file of prompts are no requests; the first of them are listed
    │   └── ResultFileError       a file of results is of other prompts, or of something else
    ├── LaunchError               a worker could not be started, died before joining, or could not load
    │   ├── NotEnoughMemory       the plan does not fit; nothing was loaded
    │   ├── WorkerDied            a worker's process ended before it served
    │   └── WorkerAbsent          another host's worker was lost and did not come back in time
    ├── StageLost                 a worker that was serving died or fell silent
    │   └── StepStuck             all workers answer, but a step does not come back
    ├── ReplanError               the layers of a stage that is gone have no other place
    ├── GenerationError           one request failed; the pipeline lives on
    │   └── PromptTooLong         its prompt leaves no room for an answer in the context
    ├── CacheError                the cache of quantised layers cannot be read or pruned
    ├── DumpError                 what the pipeline computed cannot be written
    ├── ResultsError              answers cannot be written to their file any more; those in it stay
    ├── ConnectError              no running launch was found, or it does not answer
    └── ClosedError               a model, or a connection to one, is asked after it was closed

Every message names the culprit, the number and the remedy, and is meant to be shown as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class CoordinatorError(Exception):
    """Root of all errors of this package."""

    exit_code: ClassVar[int] = 1


class UsageError(CoordinatorError):
    """The request itself cannot be meant; nothing was started."""

    exit_code = 2


class PlanError(UsageError):
    """A plan that cannot be carried out. `faults` holds every fault found, each a sentence of its own."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        if len(self.faults) == 1:
            super().__init__(f"the plan has a fault: {self.faults[0]}")
        else:
            lines = "".join(f"\n  - {fault}" for fault in self.faults)
            super().__init__(f"the plan has {len(self.faults)} faults:{lines}")


class CompareError(UsageError):
    """A file to compare is missing or unreadable."""


class PromptFileError(UsageError):
    """Lines of a file of prompts are no requests. `faults` are sentences, the first of them if there are many."""

    def __init__(self, path: Path, faults: Sequence[str], num_faults: int | None = None) -> None:
        self.faults = tuple(faults)
        num_faults = len(self.faults) if num_faults is None else num_faults
        if num_faults == 1:
            super().__init__(f"{path}, {self.faults[0]}")
            return
        lines = [*self.faults, f"... and {num_faults - len(self.faults)} more"][: min(num_faults, len(faults) + 1)]
        super().__init__(f"{path} has {num_faults} faults:" + "".join(f"\n  - {line}" for line in lines))


class ResultFileError(UsageError):
    """A file of results is of other prompts, or of something else, or somebody else writes it."""


class LaunchError(CoordinatorError):
    """A worker could not be started, died before joining, or could not load."""


class NotEnoughMemory(LaunchError):  # noqa: N818 - named for what is the matter
    """The plan does not fit into the memory of its devices; nothing was loaded."""


class WorkerDied(LaunchError):  # noqa: N818 - named for what happened
    """A worker's process ended before it served. `was_killed`: from outside, so that another one may live.

    `by_sigkill`: by the signal with which a system kills when memory runs out.
    """

    def __init__(self, text: str, *, was_killed: bool = False, by_sigkill: bool = False) -> None:
        super().__init__(text)
        self.was_killed = was_killed
        self.by_sigkill = by_sigkill


class WorkerAbsent(LaunchError):  # noqa: N818 - named for what is the matter
    """Another host's worker was lost and did not come back in time, and no spare one will do."""


class StageLost(CoordinatorError):  # noqa: N818 - named for what happened, as the design does
    """A worker that was serving died or fell silent. `by_sigkill` as of `WorkerDied`."""

    def __init__(self, text: str, *, by_sigkill: bool = False) -> None:
        super().__init__(text)
        self.by_sigkill = by_sigkill


class StepStuck(StageLost):
    """All workers answer, but a step does not come back."""


class ReplanError(CoordinatorError):
    """The layers of a stage that is gone for good have no other place; the plan is as it was."""


class GenerationError(CoordinatorError):
    """One request failed; the pipeline lives on."""


class PromptTooLong(GenerationError):  # noqa: N818 - named for what is the matter
    """The prompt leaves no room for an answer in the context; a shorter one may have it."""


class CacheError(CoordinatorError):
    """The cache of quantised layers cannot be read or pruned."""


class DumpError(CoordinatorError):
    """What the pipeline computed cannot be written to the file."""


class ResultsError(CoordinatorError):
    """Answers cannot be written to their file any more; those in it stay."""


class ConnectError(CoordinatorError):
    """No running launch was found, or it does not answer."""


class ClosedError(CoordinatorError):
    """A model, or a connection to one, is asked after it was closed."""
