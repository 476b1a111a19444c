"""Quantised units that were made before: files in a cache directory, by model and scheme, of use to every split.

The cache directory has a directory for each model and scheme; where it is switched off, nothing is kept and nothing is
looked for. Files are whole or absent, and any number of workers may write the same one: the last one stays, and all are
alike.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from glm.cache_dir import PRIVATE, cache_dir, make_private
from glm.checkpoint import Checkpoint, ModelSource
from glm.config import ModelConfig
from glm.converted import file_name, scheme
from glm.cost import stored_bytes
from glm.errors import CheckpointError, ShardError
from glm.json_file import read_json_object
from glm.layout import Unit, layer_unit
from glm.part_file import PartFile, write_parts, write_text
from glm.precision import Precision
from glm.quantization import StoredPart
from glm.small_file import is_file, is_open
from glm.weights import quantized, read_parts

LEAST_UNIT_BYTES = 4 << 20
"""What is smaller is quantised sooner than found."""
_ABOUT = "about.json"
_FORMAT = 2
_ABANDONED_S = 3600.0


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept of one model in one scheme; `used_at_s` in seconds since the epoch."""

    directory: Path
    model: str
    precision: str
    num_units: int
    num_bytes: int
    used_at_s: float


def is_cacheable(checkpoint: ModelSource, config: ModelConfig, precision: Precision) -> bool:
    """Whether there is something to quantise that will be the same the next time, of a model that lies on a disk."""
    return isinstance(checkpoint, Checkpoint) and _is_quantised_here(config, precision)


def _is_quantised_here(config: ModelConfig, precision: Precision) -> bool:
    published_bits = config.quantization_bits
    return precision.is_quantized and (published_bits is None or published_bits > precision.bits)


def entry_directory(cache: Path, fingerprint: str, precision: Precision) -> Path:
    """The directory of one model in one scheme."""
    recipe = json.dumps([_FORMAT, scheme(precision)], sort_keys=True)
    return cache / f"{fingerprint}-{precision.value}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"


def is_to_be_kept(checkpoint: ModelSource, config: ModelConfig, precision: Precision, cache: Path) -> bool:
    """Whether loading layers at this precision would make an entry that is not there yet."""
    return (
        is_cacheable(checkpoint, config, precision)
        and is_worth_keeping(config, precision)
        and not entry_directory(cache, checkpoint.fingerprint(), precision).is_dir()
    )


def is_worth_keeping(config: ModelConfig, precision: Precision) -> bool:
    """Whether layers of this shape are quantised at this precision, and are large enough to be kept."""
    layer_bytes = stored_bytes(layer_unit(config, 0), precision, getattr(torch, config.stored_dtype))
    return _is_quantised_here(config, precision) and layer_bytes >= LEAST_UNIT_BYTES


def with_cache(
    checkpoint: ModelSource, config: ModelConfig, precision: Precision, device: torch.device, cache: Path | None = None
) -> ModelSource:
    """The checkpoint, through the cache (default: `cache_dir()`) where that is of use at this precision."""
    cache = cache or cache_dir()
    if cache is None or not is_cacheable(checkpoint, config, precision):
        return checkpoint
    return CachedCheckpoint(checkpoint, config, precision, device, cache)


class CachedCheckpoint:
    """A `UnitSource`: units from the cache, or quantised on `device` and kept there if the disk has room.

    `complaint` says why something was not kept, None while all was.
    """

    def __init__(
        self, checkpoint: ModelSource, config: ModelConfig, precision: Precision, device: torch.device, cache: Path
    ) -> None:
        self.model_dir = checkpoint.model_dir
        self.directory = entry_directory(cache, checkpoint.fingerprint(), precision)
        self.num_found = 0
        self.complaint: str | None = None
        self._checkpoint = checkpoint
        self._config = config
        self._precision = precision
        self._device = device

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def fingerprint(self) -> str:
        """That of the model itself."""
        return self._checkpoint.fingerprint()

    def read_unit(self, unit: Unit) -> Mapping[str, StoredPart]:
        """The unit with its matrices quantised; small units, and those without any, as they are.

        Raises:
            CheckpointError: it is not in the cache, and the checkpoint has none either.
        """
        num_bytes = stored_bytes(unit, self._precision, getattr(torch, self._config.stored_dtype))
        if num_bytes < LEAST_UNIT_BYTES or all(source.num_columns is None for source in unit.sources.values()):
            return read_parts(self._checkpoint, unit, self._config)
        found = self._find(unit)
        if found is None:
            found = quantized(read_parts(self._checkpoint, unit, self._config), self._precision, self._device)
            self._keep(unit, found, num_bytes)
        return found

    def _find(self, unit: Unit) -> Mapping[str, StoredPart] | None:
        path = self.directory / file_name(unit.name)
        try:
            if not is_file(path, ShardError):
                return None
            file = PartFile(path)
            if file.owner != self.directory.name or path.is_symlink() or not file.is_own:
                raise ShardError(f"{path} was not made here")
            found = file.parts(unit)
        except CheckpointError:
            with contextlib.suppress(OSError):
                path.unlink()  # whatever happened to it, it is made again
            return None
        self.num_found += 1
        with contextlib.suppress(OSError):
            os.utime(self.directory / _ABOUT, follow_symlinks=False)
        return found

    def _keep(self, unit: Unit, parts: Mapping[str, StoredPart], num_bytes: int) -> None:
        if self.complaint is not None:
            return
        try:
            make_private(self.directory)
            usage = shutil.disk_usage(self.directory)
            if usage.free - num_bytes < spare_bytes(usage.total):
                self.complaint = f"the disk of {self.directory} has only {usage.free / 1e9:.1f} GB free"
                return
            _remove_abandoned(self.directory)
            write_parts(self.directory / file_name(unit.name), unit, parts, self.directory.name, PRIVATE)
            about = {"model": self._config.name or self.model_dir.name, "path": str(self.model_dir)}
            write_text(self.directory / _ABOUT, json.dumps(about | {"precision": self._precision.value}))
        except OSError as error:
            place, needed = error.filename or self.directory, f"{num_bytes / 1e6:.1f} MB"
            self.complaint = f"{place}: {error.strerror or error}, {needed} are needed"


def spare_bytes(total_bytes: int) -> int:
    """What the cache leaves free of a disk, to be no nuisance: a tenth, but not more than 10 GB."""
    return min(total_bytes // 10, 10 * 10**9)


def entries(cache: Path) -> tuple[Entry, ...]:
    """What is kept, the longest unused first."""
    found = [_entry(directory) for directory in _directories(cache)]
    return tuple(sorted(found, key=lambda entry: entry.used_at_s))


def prune(
    cache: Path, *, older_than_s: float | None = None, most_bytes: int | None = None, now_s: float | None = None
) -> tuple[Entry, ...]:
    """Remove what was unused for so long, then the longest unused until at most so much is left; with neither, all.

    What a crash left half written goes too. Who is reading a removed file may go on. Returns what was removed.

    Raises:
        OSError: something cannot be removed.
    """
    now_s = time.time() if now_s is None else now_s
    kept, removed = list(entries(cache)), []
    total_bytes = sum(entry.num_bytes for entry in kept)
    for entry in kept:
        is_old = older_than_s is not None and now_s - entry.used_at_s > older_than_s
        is_beyond = most_bytes is not None and total_bytes > most_bytes
        if is_old or is_beyond or (older_than_s is None and most_bytes is None):
            _remove(entry.directory)
            total_bytes -= entry.num_bytes
            removed.append(entry)
        else:
            _remove_abandoned(entry.directory)
    return tuple(removed)


def _directories(cache: Path) -> Iterable[Path]:
    """Only what we made: nothing else in the directory is touched, nor what other users keep there for themselves."""
    if not cache.is_dir():
        return []
    names = {precision.value for precision in Precision if precision.is_quantized}
    return [
        path
        for path in cache.iterdir()
        if path.name.count("-") == 2
        and path.name.split("-")[1] in names
        and path.is_dir()
        and not path.is_symlink()
        and is_open(path)
    ]


def _entry(directory: Path) -> Entry:
    about = {}
    with contextlib.suppress(CheckpointError):
        about = read_json_object(directory / _ABOUT, CheckpointError)
    model = "".join(filter(str.isprintable, str(about.get("model") or "")))[:200] or "unknown"
    used_at_s, sizes = directory.stat().st_mtime, {}
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a worker has just renamed it
            status = path.stat()
            used_at_s, sizes[path.name] = max(used_at_s, status.st_mtime), status.st_size
    return Entry(
        directory=directory,
        model=model,
        precision=directory.name.split("-")[1],
        num_units=sum(1 for name in sizes if name.endswith(".safetensors")),
        num_bytes=sum(sizes.values()),
        used_at_s=used_at_s,
    )


def _remove(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink(missing_ok=True)
    directory.rmdir()


def _remove_abandoned(directory: Path) -> None:
    """What a killed worker was writing; one that lives finishes a file within an hour."""
    for path in directory.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                path.unlink()
