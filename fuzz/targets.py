"""All targets by name."""

from fuzz.frames import FRAMES
from fuzz.target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (FRAMES,)}
