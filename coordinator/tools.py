"""Descriptions of tools that a model may call: from whoever has them, as text on the wire, to its chat format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.errors import GenerationError, UsageError
from protocol.limits import MAX_PROMPT


def tools_text(tools: Any) -> str:
    """A list of JSON objects as the text that a `ChatTurn` carries; empty for None and for an empty list.

    Raises:
        GenerationError: it is something else, or more than a message carries.
    """
    if tools is None:
        return ""
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise GenerationError('tools must be a list of JSON objects: [{"name": "...", "description": "...", ...}, ...]')
    try:
        text = json.dumps([dict(tool) for tool in tools], ensure_ascii=False, allow_nan=False) if tools else ""
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"tools hold something that JSON does not know ({error})") from None
    if len(text) > MAX_PROMPT:
        raise GenerationError(f"tools have {len(text)} characters as JSON; {MAX_PROMPT} are the most")
    return text


def tools_of(text: str) -> tuple[Mapping[str, Any], ...]:
    """The tools in what a `ChatTurn` carries. Raises GenerationError: a client has sent something else."""
    if not text:
        return ()
    try:
        tools = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"tools are not readable as JSON ({error})") from None
    tools_text(tools)
    return tuple(tools)


def read_tools(path: Path) -> str:
    """What `--tools FILE` holds, as a `ChatTurn` carries it. Raises UsageError."""
    try:
        tools = json.loads(path.expanduser().read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"--tools {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--tools {path} is not readable JSON ({error})") from None
    try:
        text = tools_text(tools)
    except GenerationError as error:
        raise UsageError(f"--tools {path}: {error}") from None
    if not text:
        raise UsageError(f"--tools {path} holds no tool; leave it out")
    return text
