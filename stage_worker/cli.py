"""`glmpipe worker` and `python -m stage_worker`: one stage worker, until it is told to leave.

Exit codes: 0 asked to leave by the coordinator, 1 an internal error, 2 bad options, 3 the coordinator or the launcher
is gone, 4 refused by the coordinator, 128 + N asked to leave by signal N.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glm.command_line import Parser
from glm.signals import NUMBERS
from protocol.endpoints import checked_endpoint, is_local
from protocol.errors import EndpointError, SecurityError
from protocol.version import VERSION
from stage_worker.join_token import TOKEN_VARIABLE, read_token

LOCAL_JOIN_TIMEOUT_S = 60.0
EXAMPLES = """\
On another host than the coordinator's, with what `glmpipe launch --listen` printed there:
  glmpipe worker --join tcp://192.168.1.2:7410 --key 'COORDINATOR KEY' --token-file - --device cuda:0
It asks for the token that the launch gives out; for a service, `--token-file FILE` or the variable GLMPIPE_JOIN_TOKEN
has it. Once it was used, it may go: the coordinator's host keeps this host's key (`glmpipe keys list` there). The
worker may start before the coordinator, waits for it as long as it takes, and keeps its weights for the next one.
"""


@dataclass(frozen=True, slots=True)
class OwnModel:
    """The model that a worker was started for: a directory, hub id or `random:SHAPE`, and a revision."""

    name: str
    revision: str | None


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What was asked for on the command line."""

    join: str
    device: str
    num_threads: int | None
    worker_id: str
    join_timeout_s: float | None
    lifeline_fd: int | None
    listen: str | None = None
    server_key: str | None = None
    token: str | None = None
    keys: Path | None = None
    model: OwnModel | None = None
    log_json: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker; returns the exit code."""
    options = parse_options(arguments)
    # OpenMP reads this when torch is imported. Spinning threads would take the cores from the stage whose turn it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Torch takes seconds to import: not for --help. Until then there is nobody to tell, so a signal ends it all.
    from stage_worker.process import run_worker

    return run_worker(options, _catch_signals())


def parse_options(arguments: Sequence[str] | None) -> WorkerOptions:
    """Exits with code 2 and a usage message if the options cannot be."""
    description = "Serve one stage of a pipeline: join a coordinator, load what it assigns."
    parser = Parser(prog="glmpipe worker", description=description, epilog=EXAMPLES)
    parser.add_argument("--join", required=True, metavar="ENDPOINT", type=_endpoint, help="the coordinator's endpoint")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=_count, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--worker-id", type=_worker_id, metavar="ID", help="name to join with (default: DEVICE-PID)")
    parser.add_argument(
        "--join-timeout",
        type=_seconds,
        metavar="S",
        help="leave if not welcomed by then (default: 60; with --key wait for ever)",
    )
    _add_other_hosts_options(parser)
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
    _check_keys(parser, given)
    timeout_s = given.join_timeout or (None if given.key else LOCAL_JOIN_TIMEOUT_S)
    return WorkerOptions(
        given.join,
        given.device,
        given.threads,
        worker_id,
        timeout_s,
        given.lifeline_fd,
        given.listen,
        given.key,
        read_token(parser, given),
        given.keys,
        None if given.model is None else OwnModel(given.model, given.revision),
        given.log_json,
    )


def _add_other_hosts_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a coordinator on another host")
    group.add_argument("--key", metavar="KEY", type=_key, help="the coordinator's public key, as its host shows it")
    group.add_argument(
        "--token-file",
        metavar="FILE|-",
        help="has the token (from glmpipe launch) that lets this host's key in, once and soon: a file of mode 0600, "
        f"or - for standard input (default: ${TOKEN_VARIABLE}, if it is set)",
    )
    group.add_argument("--token", metavar="T", help=argparse.SUPPRESS)
    group.add_argument("--keys", metavar="DIR", type=Path, help="where keys are (default ~/.config/glmpipe/keys)")
    group.add_argument(
        "--listen",
        metavar="ENDPOINT",
        type=_endpoint,
        help="tcp://ADDR:PORT where the stage before this one reaches it (default: a free port of the address that "
        "leads to the coordinator)",
    )
    group.add_argument("--model", metavar="DIR|ID", help="where this host has the model (default: as launched)")
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model")


def _check_keys(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if given.key is None and not is_local(given.join):
        parser.error(f"--join {given.join} is another host, which must be known by its key: add --key KEY")
    if given.key is not None and not given.join.startswith("tcp://"):
        parser.error(f"--key is for tcp://, not for {given.join}: drop it")
    if given.token is not None:
        parser.error(
            "--token shows the token to everybody on this host (ps), so that it is no secret any more: let the launch "
            f"give out another one, and use --token-file FILE, --token-file - or {TOKEN_VARIABLE}"
        )
    if given.token_file is not None and given.key is None:
        parser.error("--token-file proves nothing to a coordinator that is not known by its key: add --key KEY")
    if given.revision is not None and given.model is None:
        parser.error(f"--revision {given.revision} is of no model: add --model ID")


def _catch_signals() -> int:
    """Let signals write to a pipe and do nothing else; returns its read end."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in NUMBERS:
        signal.signal(number, lambda *_: None)
    return read_fd


def _endpoint(text: str) -> str:
    try:
        return checked_endpoint(text)
    except EndpointError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _key(text: str) -> str:
    from protocol.security import checked_key

    try:
        return checked_key(text)
    except SecurityError as error:
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
