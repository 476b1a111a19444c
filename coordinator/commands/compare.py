"""`glmpipe compare`: are two dumps the same, and if not, where does it begin?"""

import argparse
from pathlib import Path

from coordinator.errors import UsageError

HELP = "compare two dumps tensor by tensor"
EXAMPLES = """\
examples:
  glmpipe compare a.safetensors b.safetensors                  # bit for bit
  glmpipe compare fp32.safetensors int8.safetensors --atol 0.05 --rtol 0.01

exit code: 0 the same, 1 different, 2 a file that cannot be used
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("first", metavar="A", type=Path, help="a safetensors file, such as `glmpipe dump` writes")
    parser.add_argument("second", metavar="B", type=Path, help="another one")
    parser.add_argument("--atol", metavar="X", type=float, default=0.0, help="absolute tolerance (default 0: exact)")
    parser.add_argument("--rtol", metavar="X", type=float, default=0.0, help="tolerance relative to B (default 0)")
    parser.add_argument("-v", "--verbose", action="store_true", help="every tensor that differs, not only the first")


def run(options: argparse.Namespace) -> int:
    """Print the verdict; 0 the same, 1 different."""
    from coordinator.compare import compare

    for name in ("atol", "rtol"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise UsageError(f"--{name} {getattr(options, name)} is not a tolerance; it must be 0 or more")
    found = compare(options.first, options.second, atol=options.atol, rtol=options.rtol)
    tolerance = f"(atol {options.atol:g}, rtol {options.rtol:g})"
    if not found.differences:
        print(f"the same: {found.num_compared} tensors, largest difference {found.max_difference:g} {tolerance}")
        return 0
    shown = found.differences if options.verbose else found.differences[:1]
    print(*shown, sep="\n")
    print(f"{len(found.differences)} tensors differ, {found.num_compared} are in both files {tolerance}")
    return 1
