"""Reads the small JSON files of a model directory."""

import json
from pathlib import Path
from typing import Any

from glm.errors import GlmError
from glm.small_file import is_file, read_whole

MOST_BYTES = 64 << 20
"""No published one has a tenth of that, and what is read takes ten times as much memory."""


def read_json_object(path: Path, error_type: type[GlmError]) -> dict[str, Any]:
    """The keys of a JSON file; none where there is no such file.

    Raises:
        GlmError: of the type asked for: the file is there but no JSON object.
    """
    if not is_file(path, error_type):
        return {}
    try:
        found = json.loads(read_whole(path, error_type, MOST_BYTES).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise error_type(f"{path} holds a {type(found).__name__}, not a JSON object: download it again")
    return found
