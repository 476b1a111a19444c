"""A stage worker that is let in and lies when it is told to: once, in one field of one message.

    python -m tests.end_to_end.lying_worker LIE [a worker's options]

LIE is a file with a `lies.Lie`, which goes when that was told, or cannot be. `Failed`, `Leaving`, `Progress` and
`StepFailed` are said in place of an answer, of Pongs and of a step. Refused, or held as a spare, it comes again with
the truth.
"""

import sys
from pathlib import Path
from typing import Any

from protocol import sockets, wire
from protocol.control import Failed, Leaving, Pong, Progress, Ready
from protocol.data import Step, StepFailed
from protocol.errors import ProtocolError
from stage_worker import control_link
from stage_worker import worker as worker_module
from stage_worker.cli import main as worker
from tests.end_to_end.lies import Lie, told


def main() -> int:
    lie_path, *options = sys.argv[1:]
    _lie_from(Path(lie_path))
    _come_again()
    return worker(options)


def _lie_from(path: Path) -> None:
    encode = wire.encode

    def lying(message: Any, tensors: Any = ()) -> Any:
        lie = Lie.read(path)
        false = None if lie is None else _instead(message, lie.kind)
        if lie is None or false is None:
            return encode(message, tensors)
        try:
            return encode(told(false, lie.path, lie.value), () if isinstance(false, StepFailed) else tensors)
        except (ProtocolError, KeyError, TypeError):  # no message at all, which others look after
            return encode(message, tensors)
        finally:
            path.unlink(missing_ok=True)

    sockets.encode = lying  # type: ignore[attr-defined]
    worker_module.encode = lying  # type: ignore[attr-defined]
    worker_module.encode_valid = lying  # type: ignore[attr-defined]


def _instead(message: Any, kind: str) -> Any:
    """What would be said of this kind in place of a message; None if nothing would."""
    if type(message).__name__ == kind:
        return message
    if kind == "Failed" and isinstance(message, Ready):
        return Failed(message.request_id, message.epoch, "internal", "no")
    if kind == "Leaving" and isinstance(message, Pong):
        return Leaving(0, "bye")
    if kind == "Progress" and isinstance(message, Pong):
        return Progress(0, message.epoch, 1, 2, 100)
    if kind == "StepFailed" and isinstance(message, Step) and message.spans:
        return StepFailed(message.epoch, message.step_id, 0, "internal", "no", message.updates, message.timings)
    return None


def _come_again() -> None:
    leave, welcomed = control_link.ControlLink._leave, control_link.ControlLink._on_welcome

    def ask_again(self: Any, welcome: Any) -> None:
        welcomed(self, welcome)
        self._ask_again_s = 0.0 if welcome.is_spare else None

    def stay(self: Any, code: int, reason: str, request_id: int = 0) -> None:
        if code == control_link.EXIT_REFUSED:
            self._ask_again_s = 0.0
        else:
            leave(self, code, reason, request_id)

    control_link.ControlLink._on_welcome = ask_again  # type: ignore[method-assign]
    control_link.ControlLink._leave = stay  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
