"""Hosts both ends of a GLM model, walks its stages, and is what users start: launch, chat, generate, dump.

`coordinator.launch(model, plan)` is the way in from Python. It is imported when first asked for, because it
brings torch along, and `glmpipe --help` should not have to wait for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.chat_model import ChatModel, launch

__all__ = ["ChatModel", "launch"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from coordinator import chat_model

        return getattr(chat_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
