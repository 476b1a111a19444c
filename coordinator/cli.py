"""`glmpipe`: the command line. Parses, dispatches, and turns every error for users into a line on stderr.

Exit codes: 0 done, 1 something was tried and failed (for `compare`: different), 2 wrong use, nothing was tried, 128 + N
ended by signal N (a chat that was left: 0). Nothing heavy is imported before a command needs it.
"""

import io
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
from coordinator.errors import CoordinatorError
from coordinator.log import JsonLog
from coordinator.signals import leaving_on_signals
from glm.command_line import Parser
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
    _print_any_character()
    # OpenMP reads this when torch is imported. Spinning threads would take the cores from the stage whose turn it is.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = make_parser().parse_args(words)
    try:
        with leaving_on_signals():
            code: int = COMMANDS[options.command].run(options)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _forget_stdout()
        return 128 + signal.SIGPIPE
    except Exception as error:
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
    from glm.errors import GlmError
    from protocol.errors import ProtocolError

    if isinstance(error, CoordinatorError):
        return error.exit_code
    if isinstance(error, GlmError):
        return 2
    return 1 if isinstance(error, ProtocolError) else None


def _print_any_character() -> None:
    """A terminal whose encoding lacks a character shows a replacement instead of ending the answer."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _forget_stdout() -> None:
    """Nobody reads any more: keep the interpreter from complaining about it when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
