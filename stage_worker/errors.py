"""What can go wrong in a stage worker.

StageError
├── DeviceError       the device does not exist, or cannot be used
├── LoadError         an assignment that cannot be taken; becomes a Failed message
├── StepError         a step that cannot be done; becomes a StepFailed message
├── InspectError      something asked for that is not held; becomes a Failed message
└── AbandonedError    nobody waits for this work any more: a release or the end of the process
"""

from protocol.control import ControlFailureCode
from protocol.data import StepFailureCode


class StageError(Exception):
    """Root of all errors of this program."""


class DeviceError(StageError):
    """The device is misspelt, absent or unusable; the text lists those that exist."""


class LoadError(StageError):
    """An assignment that cannot be taken."""

    def __init__(self, code: ControlFailureCode, text: str) -> None:
        super().__init__(text)
        self.code: ControlFailureCode = code
        self.text = text


class StepError(StageError):
    """A step that cannot be done; other sequences are not touched by it."""

    def __init__(self, code: StepFailureCode, text: str) -> None:
        super().__init__(text)
        self.code: StepFailureCode = code
        self.text = text


class InspectError(StageError):
    """What was asked for is not held here."""


class AbandonedError(StageError):
    """The work in hand was given up half-way because nobody waits for it any more."""
