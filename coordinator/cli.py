"""`glmpipe`: the command line. Parses, dispatches, and turns every error for users into a line on stderr.

Exit codes: 0 done, 1 something was tried and failed (for `compare`: different), or stdout took no more, 2 wrong use,
nothing was tried, 128 + N ended by signal N (a chat that was left: 0). Nothing heavy is imported before a command needs
it.
"""

import errno
import os
import signal
import sys
from collections.abc import Sequence

from coordinator.commands import (
    bench,
    cache,
    chat,
    compare,
    convert,
    doctor,
    dump,
    generate,
    keys,
    launch,
    score,
    worker,
)
from coordinator.commands.session import log_of
from coordinator.errors import CoordinatorError, UsageError
from coordinator.log import JsonLog
from glm.command_line import EXIT_USAGE, Parser
from glm.standard_streams import OutputError
from protocol.version import VERSION

DESCRIPTION = (
    "GLM models as a pipeline of stage workers: one contiguous layer range per device, each at its own precision."
)
EXAMPLES = """\
examples:
  glmpipe chat                                     chat with the demo model that comes along
  glmpipe chat --layers cpu=1-3 --layers cpu=4-6   the same, split over two worker processes
  glmpipe generate --prompt "你好" --stats          one question, and what the answer cost
  glmpipe COMMAND --help                           everything about a command, with examples
"""
_UNREACHABLE = (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP)
COMMANDS = {
    "chat": chat,
    "generate": generate,
    "launch": launch,
    "keys": keys,
    "convert": convert,
    "cache": cache,
    "score": score,
    "bench": bench,
    "dump": dump,
    "compare": compare,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code. Raises SystemExit as argparse does (help, version, wrong usage)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if words[:1] == ["worker"]:
        worker.become_worker(words[1:])
    # OpenMP reads this when torch is imported. Spinning threads would take the cores from the stage whose turn it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = make_parser()
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    options = parser.parse_args(words)
    try:
        return int(COMMANDS[options.command].run(options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (BrokenPipeError, OutputError):
        raise  # for `run_program`
    except Exception as caught:
        error = _of_a_path(caught) or caught
        code_for_users, log = _exit_code(error), log_of(options)
        if code_for_users is not None:
            log.failed(error)
            return code_for_users
        if not isinstance(log, JsonLog):
            raise
        log.broke(error)
        return 1


def make_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(prog="glmpipe", description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"glmpipe {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        description = f"{command.HELP[0].upper()}{command.HELP[1:]}."
        own = commands.add_parser(name, help=command.HELP, description=description, epilog=command.EXAMPLES)
        own.neighbours = commands.choices
        command.add_parser(own)
    commands.add_parser("worker", help=worker.HELP, add_help=False)
    return parser


def _exit_code(error: Exception) -> int | None:
    """The exit code for an error that is meant for users, None for our own bugs."""
    from glm.errors import GlmError, HubError
    from protocol.errors import ProtocolError

    if isinstance(error, CoordinatorError):
        return error.exit_code
    if isinstance(error, HubError | ProtocolError):
        return 1
    return 2 if isinstance(error, GlmError) else None


def _of_a_path(error: Exception) -> UsageError | None:
    """What to tell whoever named a path that cannot be looked at: too long, or below a directory that is closed."""
    if not isinstance(error, OSError) or error.errno not in _UNREACHABLE or error.filename is None:
        return None
    remedy = "check its permissions and those of the directories above it"
    if error.errno != errno.EACCES:
        remedy = "check how it is written"
    return UsageError(f"{error.filename!s:.200}: {error.strerror}: {remedy}")
