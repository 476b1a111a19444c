"""`glmpipe worker` and `python -m stage_worker`: one stage worker, until it is told to leave.

Exit codes: 0 asked to leave (Shutdown or a signal), 1 an internal error, 2 bad options or refused by the coordinator,
3 the coordinator or the launcher is gone.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.endpoints import checked_endpoint
from protocol.errors import EndpointError
from protocol.version import VERSION

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What was asked for on the command line."""

    join: str
    device: str
    num_threads: int | None
    worker_id: str
    join_timeout_s: float
    lifeline_fd: int | None
    log_json: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker; returns the exit code."""
    options = parse_options(arguments)
    # OpenMP reads this when torch is imported. Spinning threads would take the cores from the stage whose turn it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch takes seconds to import: not for --help. Until then there is nothing to clean up, so a signal ends it all.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from stage_worker.process import run_worker

    return run_worker(options, _catch_signals())


def parse_options(arguments: Sequence[str] | None) -> WorkerOptions:
    """Exits with code 2 and a usage message if the options cannot be."""
    parser = argparse.ArgumentParser(
        prog="glmpipe worker", description="Serve one stage of a pipeline: join a coordinator, load what it assigns."
    )
    parser.add_argument("--join", required=True, metavar="ENDPOINT", type=_endpoint, help="the coordinator's endpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--worker-id", type=_worker_id, metavar="ID", help="name to join with (default: DEVICE-PID)")
    parser.add_argument(
        "--join-timeout", type=_seconds, default=60.0, metavar="S", help="leave if not welcomed by then (default: 60)"
    )
    parser.add_argument("--lifeline-fd", type=int, metavar="FD", help="leave when this inherited pipe is closed")
    parser.add_argument("--log-json", action="store_true", help="log one JSON object a line")
    parser.add_argument("--version", action="version", version=f"glmpipe {VERSION}")
    given = parser.parse_args(arguments)
    worker_id = given.worker_id or f"{given.device}-{os.getpid()}"
    if given.lifeline_fd is not None:
        try:
            os.fstat(given.lifeline_fd)
        except OSError as error:
            parser.error(f"--lifeline-fd {given.lifeline_fd}: {error.strerror}")
    return WorkerOptions(
        given.join, given.device, given.threads, worker_id, given.join_timeout, given.lifeline_fd, given.log_json
    )


def _catch_signals() -> int:
    """Let signals write to a pipe and do nothing else; returns its read end."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, lambda *_: None)
    return read_fd


def _endpoint(text: str) -> str:
    try:
        return checked_endpoint(text)
    except EndpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 4096")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.1 <= seconds <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 1000000")
    return seconds


def _worker_id(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,100}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of letters, digits and . _ : - only (at most 100)")
    return text


if __name__ == "__main__":
    sys.exit(main())
