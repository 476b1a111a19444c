"""The user's home directory, which not everybody has: a container's user may be in no list, and HOME be unset."""

from pathlib import Path


def home() -> Path | None:
    """Where it is, if that is known."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def expanded(path: str | Path) -> Path:
    """The path with `~` or `~user` replaced, as it is where no such home is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
