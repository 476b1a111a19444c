"""Where what was made once is kept for the next time: quantised layers, compiled kernels."""

import os
from collections.abc import Mapping
from pathlib import Path

DIRECTORY_VARIABLE = "GLMPIPE_CACHE_DIR"
SWITCH_VARIABLE = "GLMPIPE_CACHE"


def cache_dir(environment: Mapping[str, str] = os.environ) -> Path | None:
    """`$GLMPIPE_CACHE_DIR`, else `glmpipe` in `$XDG_CACHE_HOME` (`~/.cache`); None where the cache is switched off."""
    if environment.get(SWITCH_VARIABLE, "on").lower() in ("off", "0", "no", "false"):
        return None
    if chosen := environment.get(DIRECTORY_VARIABLE):
        return Path(chosen).expanduser().absolute()
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "glmpipe"
