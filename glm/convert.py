"""Quantise a model once and for all: into a directory that any split loads at about the speed of reading it."""

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from glm.checkpoint import ModelSource
from glm.config import ModelConfig, load_config
from glm.converted import MANIFEST, FileFacts, Manifest, file_name, is_converted
from glm.cost import stored_bytes
from glm.ends import stored_embedding, stored_lm_head
from glm.errors import ConversionError, DiskSpaceError
from glm.foreign_model import UNFINISHED
from glm.hub import SMALL_FILES
from glm.json_file import MOST_BYTES, read_json_object
from glm.layout import Unit, all_units
from glm.lineage import find_lineage
from glm.model_source import open_checkpoint
from glm.part_file import sync_directory, write_parts, write_text
from glm.precision import Precision
from glm.quantization import StoredPart
from glm.shapes import SHAPES, random_shape
from glm.signals import undone_at_signals
from glm.small_file import is_file, read_whole
from glm.weights import quantized, read_parts

_COPIED = (*SMALL_FILES, "*LICENSE*")
_SPARE_BYTES = 64 << 20  # tokenizer, headers, what the file system itself takes

ConvertProgress = Callable[[str, int, int], None]
"""Called with a unit's name before it is written, and the bytes written and to be written in all."""


def convert(
    model_dir: Path,
    out: Path,
    precision: Precision,
    lm_head_precision: Precision | None,
    progress: ConvertProgress = lambda *_: None,
) -> Manifest:
    """Write the model at a quantised precision; the embedding, and lm_head with None for it, stay as published.

    `out` is a directory to be made, an empty one, or one that an interrupted conversion left, which is started again.
    It is no model before everything is in it.

    Raises:
        ConversionError: the model is converted already, or `out` is in use.
        DiskSpaceError: with how much is needed and available; nothing was written, or what was is removed.
        GlmError: the model itself is not usable.
    """
    if is_converted(model_dir):
        raise ConversionError(f"{model_dir} is a converted model already: convert the one it was made from")
    config, checkpoint = load_config(model_dir), open_checkpoint(model_dir)
    wanted = _wanted(config, precision, lm_head_precision)
    sizes = _sizes(config, wanted)
    with _claimed(out, sum(sizes.values()) + _SPARE_BYTES):
        files, done = {}, 0
        for unit in all_units(config):
            progress(unit.name, done, sum(sizes.values()))
            written = write_parts(out / file_name(unit.name), unit, _parts(checkpoint, unit, config, wanted[unit.name]))
            files[unit.name] = FileFacts(written.num_bytes, written.sha256)
            done += sizes[unit.name]
        progress("", done, done)
        raw = _copy_small_files(model_dir, out)
        name, fingerprint = config.name or model_dir.name, checkpoint.fingerprint()
        lineage = find_lineage(config, model_dir) if config.family == "chatglm2" else None
        manifest = Manifest(name, fingerprint, precision, lm_head_precision, raw, files, lineage)
        write_text(out / MANIFEST, manifest.to_json())
    return manifest


def check_room(model_dir: Path, out: Path, precision: Precision, lm_head_precision: Precision | None) -> None:
    """Look whether `out` can be written and its disk has room, of a model whose weights need not be here yet.

    Raises:
        ConversionError, DiskSpaceError: as `convert`. ConfigError.
    """
    config = load_config(model_dir)
    _check_directory(out)
    _check_space(out, sum(_sizes(config, _wanted(config, precision, lm_head_precision)).values()) + _SPARE_BYTES)


def _wanted(
    config: ModelConfig, precision: Precision, lm_head_precision: Precision | None
) -> dict[str, Precision | None]:
    """The precision of each unit, None as published."""
    layers: dict[str, Precision | None] = {unit.name: precision for unit in all_units(config)}
    return layers | {"lm_head": lm_head_precision, "embedding": None}


def _sizes(config: ModelConfig, wanted: Mapping[str, Precision | None]) -> dict[str, int]:
    """Bytes of each unit."""
    dtype = getattr(torch, config.stored_dtype)
    return {unit.name: stored_bytes(unit, wanted[unit.name], dtype) for unit in all_units(config)}


def _parts(
    checkpoint: ModelSource, unit: Unit, config: ModelConfig, precision: Precision | None
) -> Mapping[str, StoredPart]:
    ends = {"embedding": stored_embedding, "lm_head": stored_lm_head}
    stored = ends[unit.name](checkpoint, config) if unit.name in ends else unit
    parts = read_parts(checkpoint, stored, config)
    return parts if precision is None else quantized(parts, precision, torch.device("cpu"))


@contextmanager
def _claimed(out: Path, needed_bytes: int) -> Iterator[None]:
    """Keep `out` to ourselves, marked as unfinished; if the block raises, what was written is removed."""
    _check_directory(out)
    _check_space(out, needed_bytes)
    is_ours = is_new = not out.exists()
    marker = out / UNFINISHED

    def discard() -> None:
        if is_ours and marker.exists():
            _empty(out)
            marker.unlink()
        if is_new and out.exists():
            out.rmdir()

    try:
        with undone_at_signals(discard):
            out.mkdir(parents=True, exist_ok=True)
            with marker.open("a") as handle:
                _lock(handle.fileno(), out)
                is_ours = True
                try:
                    _empty(out)
                    yield
                    sync_directory(out)
                except BaseException:
                    discard()
                    raise
                marker.unlink()
    except OSError as error:
        kind = DiskSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ConversionError
        raise kind(
            f"{error.filename or out}: {error.strerror or error}; what there was of the conversion is removed. All of "
            f"it needs {needed_bytes / 1e9:.2f} GB: make room, check the permissions, or name another directory"
        ) from error


def _check_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConversionError(f"{out} is a file: name a directory to be made")
    if not out.exists() or (out / UNFINISHED).is_file():
        return
    found = sorted(path.name for path in out.iterdir())
    if found:
        raise ConversionError(f"{out} is not empty, it holds {found[0]}: name a new directory, or empty this one")


def _check_space(out: Path, needed_bytes: int) -> None:
    place = next(place for place in (out, *out.absolute().parents) if place.exists())
    free_bytes = shutil.disk_usage(place).free
    if place == out:
        free_bytes += sum(path.stat().st_size for path in out.iterdir())
    if free_bytes < needed_bytes:
        raise DiskSpaceError(
            f"{out} needs {needed_bytes / 1e9:.2f} GB, the disk of {place} has {free_bytes / 1e9:.2f} GB free: make "
            "room, choose a lower precision or name a directory on another disk"
        )


def _lock(handle: int, out: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(
            f"{out} is being written by another conversion: wait for it or name another one"
        ) from None


def _empty(out: Path) -> None:
    """Remove what an unfinished conversion left, except its marker."""
    for path in out.iterdir():
        if path.name != UNFINISHED:
            path.unlink()


def _of_the_model(path: Path, model_dir: Path) -> bytes:
    """The contents of a small file. A link may lead to a file of the model only, so that nothing else is given away.

    A snapshot in the hub's cache consists of links to `blobs` beside it.
    """
    home = model_dir.resolve()
    homes = (home, home.parents[1] / "blobs") if home.parent.name == "snapshots" else (home,)
    target = path.resolve()
    if not any(target.is_relative_to(place) for place in homes):
        raise ConversionError(
            f"{path} is a link to {target}, outside of the model's directory, and would be copied into the new one: if "
            "that is the model's own file, put the file itself in the place of the link"
        )
    return read_whole(path, ConversionError, MOST_BYTES)


def _copy_small_files(model_dir: Path, out: Path) -> dict[str, Any]:
    """config.json and what else belongs to a model beside its weights; returns the config."""
    shape = random_shape(model_dir)
    if shape is not None:
        write_text(out / "config.json", json.dumps(SHAPES[shape], indent=1))
    else:
        for pattern in _COPIED:
            for path in model_dir.glob(pattern):
                if is_file(path, ConversionError):
                    (out / path.name).write_bytes(_of_the_model(path, model_dir))
    raw: dict[str, Any] = read_json_object(out / "config.json", ConversionError)
    return raw
