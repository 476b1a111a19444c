"""Hosts both ends of a GLM model, walks its stages, and is what users start: launch, chat, generate, dump.

`coordinator.launch(model, plan)` and `coordinator.connect()` are the ways in from Python. They are imported when first
asked for, because the one brings torch along, and `glmpipe --help` should not have to wait for that.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.chat_model import ChatModel, launch
    from coordinator.client import RemoteBackend, connect
    from coordinator.errors import CoordinatorError
    from glm.errors import GlmError

__all__ = ["ChatModel", "CoordinatorError", "GlmError", "RemoteBackend", "connect", "launch"]
_PLACES = {
    "ChatModel": "coordinator.chat_model",
    "CoordinatorError": "coordinator.errors",
    "GlmError": "glm.errors",
    "RemoteBackend": "coordinator.client",
    "connect": "coordinator.client",
    "launch": "coordinator.chat_model",
}


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
