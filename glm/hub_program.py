"""Run as a program: fetches files of a hub's model into huggingface_hub's cache, and says on stdout how far it is.

It imports nothing of this project. A process of its own can be given up when the hub does not answer, and ended at
once, which the library's threads cannot. It ends with its parent, whose end of stdin closes then.

Its argument is a JSON object: `name`, `revision` (or null), `always` and `weights`, patterns of file names; of the
weights the first list is fetched of which the hub has something. It prints one JSON object a line:

    {"said": "asks"}                                    before the hub is asked
    {"said": "answers", "num_bytes": N, "free_bytes": N}  what is to be fetched, and the room there is
    {"said": "has", "num_bytes": N}                     every second
    {"said": "done", "path": DIR}
    {"said": "fails", "why": one of WHYS, "text": ...}
"""

import errno
import json
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TextIO

WHYS = ("gated", "revision", "repository", "name", "disk", "closed", "unreachable")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_EVERY_S = 1.0


def main() -> None:
    """Fetch what the argument asks for."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _fetch(json.loads(sys.argv[1]), out)
    except Exception as error:  # the library lets errors of its HTTP client, of the disk and its own through
        lines = str(error).strip().splitlines()
        _say(out, said="fails", why=_why(error), text=f"{type(error).__name__}: {lines[0] if lines else ''}")


def _fetch(asked: dict[str, Any], out: TextIO) -> None:
    from huggingface_hub import HfApi, constants, snapshot_download

    name, revision = asked["name"], asked["revision"]
    _say(out, said="asks")
    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    weights: list[str] = next((each for each in asked["weights"] if _matching(sizes, each)), [])
    patterns = [*asked["always"], *weights]
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    there = repository / "snapshots" / str(info.sha)
    missing = sum(sizes[file] for file in _matching(sizes, patterns) if not (there / file).is_file())
    begun = sum(path.stat().st_size for path in repository.glob("blobs/*.incomplete"))
    place = next(path for path in (repository, *repository.parents) if path.is_dir())
    needed, free_bytes = max(0, missing - begun), shutil.disk_usage(place).free
    _say(out, said="answers", num_bytes=needed, free_bytes=free_bytes)
    if needed > free_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    threading.Thread(target=_report, args=(out, repository / "blobs"), daemon=True).start()
    path = snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns="*/*")
    _say(out, said="done", path=path)


def _matching(names: Any, patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _report(out: TextIO, blobs: Path) -> None:
    """How much has come, as far as the disk tells, again and again."""
    start, pause = _held(blobs), threading.Event()
    while not pause.wait(_EVERY_S):
        _say(out, said="has", num_bytes=max(0, _held(blobs) - start))


def _held(blobs: Path) -> int:
    """Bytes of the files, holes not counted."""
    total = 0
    for path in blobs.glob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue  # it was renamed, as it is whole now
    return total


def _why(error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "gated"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "repository"
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL or os.strerror(errno.ENOSPC) in str(error):
        return "disk"
    if number in _CLOSED:
        return "closed"
    return "name" if isinstance(error, ValueError) and "repo" in str(error).lower() else "unreachable"


def _say(out: TextIO, **words: object) -> None:
    out.write(json.dumps(words) + "\n")
    out.flush()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
