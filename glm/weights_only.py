"""Which versions of torch read a `.bin` file safely: those without a published way around their weights-only reader."""

import re

SAFE_SINCE = (2, 10)
_HOLES = ((2, 6), "CVE-2025-32434"), ((2, 10), "CVE-2026-24747")
"""Each is mended in this version and those after it."""


def why_unsafe(torch_version: str) -> str | None:
    """What is wrong with this version's `torch.load(..., weights_only=True)` and the remedy; None where nothing is."""
    numbers = re.match(r"(\d+)\.(\d+)", torch_version)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    holes = [name for mended, name in _HOLES if version < mended]
    if not holes:
        return None
    since = ".".join(map(str, SAFE_SINCE))
    return (
        f"a .bin file can run code as torch {torch_version} reads it ({' and '.join(holes)}); install torch {since} or "
        "newer"
    )
