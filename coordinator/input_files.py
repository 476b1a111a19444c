"""What a user has a command read whole: a file, or stdin, of a size that can be meant."""

import sys
from pathlib import Path

from coordinator.errors import UsageError
from glm.small_file import read_up_to

MOST_PLAN_BYTES = 1 << 20
MOST_PROMPT_BYTES = 32 << 20
MOST_TEXT_BYTES = 256 << 20
"""Of a text whose likelihood is asked for."""


def decoded(data: bytes) -> str:
    r"""The text of a file as it was meant: without a byte order mark, its lines ending in `\n`.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_input(name: str | Path, what: str, most_bytes: int) -> bytes:
    """All of a file, or of stdin (`-`); no more than `most_bytes` are ever in memory. `what` is how errors call it.

    Raises:
        UsageError: it cannot be read, or is larger.
    """
    try:
        if name == "-":
            found = read_up_to(sys.stdin.buffer, most_bytes + 1)
        else:
            with Path(name).open("rb") as file:
                found = read_up_to(file, most_bytes + 1)
    except OSError as error:
        raise UsageError(f"{what} {name} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{what} {str(name)!r} cannot be read: no file has such a name") from None
    if len(found) > most_bytes:
        raise UsageError(f"{what} {name} is larger than {most_bytes >> 20} MiB, the most that is read of such a file")
    return found
