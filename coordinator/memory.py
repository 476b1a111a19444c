"""How much memory this process holds."""

import os
import resource
from pathlib import Path


def resident_bytes() -> int:
    """The resident set, in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
