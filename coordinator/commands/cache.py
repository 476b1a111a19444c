"""`glmpipe cache`: what quantised layers take on disk, and removing them."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from coordinator.errors import CacheError, UsageError
from coordinator.limits import no_size, parse_bytes
from coordinator.progress import format_bytes

if TYPE_CHECKING:
    from glm.layer_cache import Entry

HELP = "show or remove the quantised layers that are kept for the next time"
EXAMPLES = """\
examples:
  glmpipe cache                                # where it is, and what each model takes
  glmpipe cache prune --older-than 30          # what was not used for 30 days
  glmpipe cache prune --max-size 20GB          # the longest unused, until 20 GB are left
  glmpipe cache prune --all

Float checkpoints that run at int8 or int4 are quantised when they are loaded. The result is kept, layer by layer, in
$GLMPIPE_CACHE_DIR (default: glmpipe in $XDG_CACHE_HOME, which is ~/.cache) as long as a tenth of the disk, or 10 GB,
stay free. GLMPIPE_CACHE=off, or --no-cache of the other commands, keeps nothing.
"""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "action", metavar="ACTION", nargs="?", choices=("show", "prune"), default="show", help="show (default) or prune"
    )
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help="another cache than the usual one")
    group = parser.add_argument_group("what prune removes", "Together: what either of them names.")
    group.add_argument("--all", action="store_true", help="everything")
    group.add_argument("--older-than", metavar="DAYS", type=float, help="what was not used for so many days")
    group.add_argument("--max-size", metavar="SIZE", help="the longest unused, until at most SIZE (20GB) is left")


def run(options: argparse.Namespace) -> int:
    """Show or prune."""
    from glm.cache_dir import cache_dir, is_switched_off
    from glm.layer_cache import entries

    limits = [name for name in ("older_than", "max_size") if getattr(options, name) is not None]
    if options.action == "show" and (options.all or limits):
        raise UsageError("only prune removes something: write `glmpipe cache prune` before what it is to remove")
    cache = options.cache_dir or cache_dir()
    if cache is None:
        why = "is switched off (GLMPIPE_CACHE)" if is_switched_off() else "has no place: set HOME or XDG_CACHE_HOME"
        print(f"the cache {why}")
        return 0
    try:
        if options.action == "prune":
            _prune(options, cache, limits)
        else:
            _show(cache, entries(cache))
    except OSError as error:
        raise CacheError(f"{error.filename or cache}: {error.strerror or error}: check its permissions") from error
    return 0


def _prune(options: argparse.Namespace, cache: Path, limits: list[str]) -> None:
    from glm.layer_cache import prune

    if options.all == bool(limits):
        raise UsageError("say what prune is to remove: --all, or else --older-than DAYS, --max-size SIZE or both")
    if options.older_than is not None and not options.older_than >= 0:
        raise UsageError(f"--older-than {options.older_than:g} is not a number of days; it must be 0 or more")
    older_than_s = None if options.older_than is None else options.older_than * 86400
    most_bytes = None if options.max_size is None else _size(options.max_size)
    removed = prune(cache, older_than_s=older_than_s, most_bytes=most_bytes)
    for entry in removed:
        print(f"removed {entry.model} {entry.precision}: {format_bytes(entry.num_bytes)}")
    print(f"{format_bytes(sum(entry.num_bytes for entry in removed))} freed in {cache}")


def _show(cache: Path, found: "tuple[Entry, ...]") -> None:
    for entry in reversed(found):
        days = max(0.0, time.time() - entry.used_at_s) / 86400
        used = "today" if days < 1 else f"{days:.0f} days ago"
        size = format_bytes(entry.num_bytes)
        print(f"{size:>9}  {entry.precision}  {entry.model}  ({entry.num_units} parts, used {used})")
    total = format_bytes(sum(entry.num_bytes for entry in found))
    print(f"{total:>9}  in {cache}" if found else f"nothing is kept in {cache}")


def _size(text: str) -> int:
    num_bytes = parse_bytes(text)
    if num_bytes is None:
        raise UsageError(f"--max-size {no_size(text)}")
    return num_bytes
