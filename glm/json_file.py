"""Reads the small JSON files of a model directory."""

import json
from pathlib import Path
from typing import Any

from glm.errors import GlmError
from glm.lfs import is_lfs_pointer, lfs_complaint

MOST_BYTES = 64 << 20
"""No published one has a tenth of that, and what is read takes ten times as much memory."""


def read_json_object(path: Path, error_type: type[GlmError]) -> dict[str, Any]:
    """The keys of a JSON file; none where there is no such file.

    Raises:
        GlmError: of the type asked for: the file is there but no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        if is_lfs_pointer(path):
            raise error_type(lfs_complaint(path))
        num_bytes = path.stat().st_size
        if num_bytes > MOST_BYTES:
            raise error_type(f"{path} has {num_bytes} bytes, far more than such a file has: download it again")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_type(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise error_type(f"{path} holds a {type(found).__name__}, not a JSON object: download it again")
    return found
