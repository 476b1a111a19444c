"""Git-LFS pointer files: what a clone without `git lfs` leaves in place of large files."""

from pathlib import Path

_MAGIC = b"version https://git-lfs"


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a pointer and not the thing itself.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def lfs_complaint(path: Path) -> str:
    """What to tell somebody whose file is a pointer."""
    return (
        f"{path} is a Git-LFS pointer of {path.stat().st_size} bytes, not the file itself: run `git lfs pull` in its "
        "directory or download it again"
    )
