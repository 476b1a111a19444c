"""The one-time token that lets this host's key in: from a private file, standard input or the environment.

Never from the command line, which every user of the host can read while the worker runs.
"""

import argparse
import getpass
import os
import re
import sys
import termios
from pathlib import Path

from glm.command_line import Parser
from glm.signals import undone_at_signals
from protocol.errors import SecurityError

TOKEN_VARIABLE = "GLMPIPE_JOIN_TOKEN"
_TOKEN = re.compile(r"[!-~]{1,256}")


def read_token(parser: Parser, given: argparse.Namespace) -> str | None:
    """The token that the options, or else the environment, lead to; None if there is none, or no coordinator's key.

    Nothing that this process starts finds it in its environment. What is no token ends the process with code 2.
    """
    token = os.environ.pop(TOKEN_VARIABLE, "").strip()
    if given.key is None:
        return None
    origin = TOKEN_VARIABLE
    if given.token_file is not None:
        origin = f"--token-file {given.token_file}"
        from protocol.key_files import read_private  # brings ZeroMQ, for which --help does not wait

        try:
            token = _from_stdin() if given.token_file == "-" else read_private(Path(given.token_file)).strip()
        except SecurityError as error:
            parser.error(f"--token-file {error}")
    if not token and given.token_file is None:
        return None
    if not _TOKEN.fullmatch(token):
        parser.error(f"{origin} has no token: one line of letters and digits, as glmpipe launch gives out")
    return token


def _from_stdin() -> str:
    """One line; on a terminal it is asked for, and not shown."""
    try:
        return (_asked() if sys.stdin.isatty() else sys.stdin.readline(1000)).strip()
    except (EOFError, UnicodeDecodeError):
        return ""


def _asked() -> str:
    """A signal that ends the process here leaves a terminal that shows what is typed."""
    settings = termios.tcgetattr(0)
    with undone_at_signals(lambda: termios.tcsetattr(0, termios.TCSANOW, settings)):
        return getpass.getpass("token: ")
