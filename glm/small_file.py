"""Files of a model that are read whole: whether they are there, and contents of a size that such a file can have."""

import os
from pathlib import Path
from typing import BinaryIO

from glm.lfs import is_lfs_pointer, lfs_complaint

_PIECE_BYTES = 1 << 20


def is_file(path: Path, error_type: type[Exception]) -> bool:
    """Whether there is such a file. Raises `error_type`: a directory on the way to it cannot be searched."""
    try:
        return path.is_file()
    except OSError as error:
        raise error_type(_cannot_be_read(path, error)) from error


def is_open(directory: Path) -> bool:
    """Whether this process may list a directory and look at what is in it."""
    return os.access(directory, os.R_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


def read_whole(path: Path, error_type: type[Exception], most_bytes: int) -> bytes:
    """All of a file. No more than `most_bytes` are ever in memory, whatever it turns out to be.

    Raises:
        error_type: it is larger, a Git-LFS pointer, or cannot be read.
    """
    try:
        if is_lfs_pointer(path):
            raise error_type(lfs_complaint(path))
        num_bytes = path.stat().st_size
        if num_bytes <= most_bytes:
            with path.open("rb") as file:
                found = read_up_to(file, most_bytes + 1)
            num_bytes = max(num_bytes, len(found))
    except OSError as error:
        raise error_type(_cannot_be_read(path, error)) from error
    if num_bytes > most_bytes:
        raise error_type(
            f"{path} has {num_bytes} bytes, far more than such a file has (at most {most_bytes}): download it again"
        )
    return found


def read_up_to(file: BinaryIO, num_bytes: int) -> bytes:
    """What a file or a stream has, at most its first `num_bytes`; takes memory for what comes alone. Raises OSError."""
    parts = []
    while num_bytes > 0 and (part := file.read(min(num_bytes, _PIECE_BYTES))):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def read_beginning(path: Path, error_type: type[Exception], num_bytes: int) -> bytes:
    """The first bytes of a file, so many or all there are. Raises `error_type`: it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(num_bytes)
    except OSError as error:
        raise error_type(_cannot_be_read(path, error)) from error


def _cannot_be_read(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror or error}): check its permissions and those of its directories"
