"""What can go wrong between a user's wish and an answer.

    CoordinatorError              exit code 1
    ├── UsageError                exit code 2: the request itself cannot be meant; nothing was started
    │   ├── PlanError             the plan has faults; all of them are listed
    │   └── CompareError          a file to compare is missing or unreadable
    ├── LaunchError               a worker could not be started, died before joining, or could not load
    │   └── NotEnoughMemory       the plan does not fit; nothing was loaded
    ├── StageLost                 a worker that was serving died or fell silent
    ├── GenerationError           one request failed; the pipeline lives on
    ├── CacheError                the cache of quantised layers cannot be read or pruned
    ├── DumpError                 what the pipeline computed cannot be written
    └── ConnectError              no running launch was found, or it does not answer

Every message names the culprit, the number and the remedy, and is meant to be shown as it is.
"""

from collections.abc import Sequence
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


class LaunchError(CoordinatorError):
    """A worker could not be started, died before joining, or could not load."""


class NotEnoughMemory(LaunchError):  # noqa: N818 - named for what is the matter
    """The plan does not fit into the memory of its devices; nothing was loaded."""


class StageLost(CoordinatorError):  # noqa: N818 - named for what happened, as the design does
    """A worker that was serving died or fell silent."""


class GenerationError(CoordinatorError):
    """One request failed; the pipeline lives on."""


class CacheError(CoordinatorError):
    """The cache of quantised layers cannot be read or pruned."""


class DumpError(CoordinatorError):
    """What the pipeline computed cannot be written to the file."""


class ConnectError(CoordinatorError):
    """No running launch was found, or it does not answer."""
