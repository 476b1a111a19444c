"""A safetensors file with the parts of a unit of the network, integer weights among them: written whole or not at all.

A part is called by the published names it was made of, joined by `+`. An integer weight is `NAME`, int8 [rows, columns]
or [rows, columns / 2] packed as `glm.quantization` says, beside `NAME_scale`, [rows, groups], or `NAME_exact_scale`
where its integers are the published model itself: a layout that belongs to no kernel, so that kernels may change
theirs. The file's metadata has the SHA-256 of its tensors, their names, types and shapes included, and one of the same
with samples of their bytes, cheap enough to be compared whenever the file is opened; and whose parts they are.
"""

import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from glm.cache_dir import is_own
from glm.checkpoint import samples
from glm.errors import MissingTensorError, ShardError, TensorShapeError
from glm.layout import Source, Unit
from glm.quantization import QuantizedWeight, StoredPart
from glm.signals import undone_at_signals

_DTYPES = {"I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MOST_HEADER_BYTES = 1 << 20
_ALIGNMENT = 64
_CHUNK_BYTES = 16 << 20
_NO_DIGEST = "0" * 64
_SCALE, _EXACT_SCALE = "_scale", "_exact_scale"


@dataclass(frozen=True, slots=True)
class Written:
    """A file as it was written; `sha256` is that of its tensors."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class _Stored:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def write_parts(path: Path, unit: Unit, parts: Mapping[str, StoredPart], owner: str = "", mode: int = 0o666) -> Written:
    """Write the parts of a unit, under another name first: `path` never holds half of them, whatever ends the writing.

    `owner` says what the parts were made of; who reads the file may ask for it. `mode` is less what the umask takes.

    Raises:
        OSError: no space, no permission; nothing is left of the file.
    """
    tensors = _tensors(unit, parts)
    with _whole(path, mode) as file:
        written = _write(file, tensors, owner)
    sync_directory(path.parent)
    return written


def write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all. Raises OSError."""
    with _whole(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def _whole(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file of another name, which becomes `path` once it is written and on the disk; nothing is left of it if not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with undone_at_signals(lambda: temporary.unlink(missing_ok=True)):
            with open(temporary, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk is told of a write, which knows no name
        raise


def sync_directory(directory: Path) -> None:
    """Let a rename inside survive a loss of power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class PartFile:
    """A file that `write_parts` wrote. Opening it reads its header and samples; `parts` maps what is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ShardError: missing, unreadable, truncated, or not what was written."""
        self.path = path
        try:
            with path.open("rb") as file:
                self._identity = _identity(file)
                self.is_own = is_own(os.fstat(file.fileno()))
                """Whether only this user, or root, can have written it."""
                self._metadata, self._tensors, self._data_start, self._facts = _read_header(path, file)
                if self._metadata.get("samples") != _sample_digest(file, self._data_start, self._facts):
                    raise _damaged(path, "its samples are not those that were written")
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error.strerror or error}): convert the model again") from error

    @property
    def sha256(self) -> str:
        """What the file says of all its tensors."""
        return self._metadata.get("sha256", "")

    @property
    def owner(self) -> str:
        """What the parts were made of."""
        return self._metadata.get("owner", "")

    def check(self) -> None:
        """Read all of it. Raises ShardError: it is not what was written."""
        with self.path.open("rb") as file:
            if _full_digest(file, self._data_start, self._facts) != self.sha256:
                raise _damaged(self.path, "its SHA-256 is another")

    def parts(self, unit: Unit) -> Mapping[str, StoredPart]:
        """The unit's parts, each a view of the file, mapped anew whenever it is asked for and for as long as it lives.

        Raises:
            MissingTensorError: a part is not in the file. TensorShapeError: it has another shape.
        """
        for source in unit.sources.values():
            self._check(source)
        return _MappedParts(self, unit)

    def part(self, source: Source) -> StoredPart:
        """One part, as in `parts`."""
        name = _name(source)
        values = self._map(name)
        if values.dtype != torch.int8:
            return values
        assert source.num_columns is not None
        is_exact = f"{name}{_EXACT_SCALE}" in self._tensors
        scales = self._map(f"{name}{_EXACT_SCALE if is_exact else _SCALE}")
        return QuantizedWeight(values, scales, 8 * values.shape[1] // source.num_columns, is_exact)

    def _check(self, source: Source) -> None:
        name, rows, columns = _name(source), sum(source.num_rows), source.num_columns
        if name not in self._tensors:
            raise MissingTensorError(f"{self.path}: {name} is not in this file: convert the model again")
        stored = self._tensors[name]
        wanted: set[tuple[int, ...]] = {(rows,) if columns is None else (rows, columns)}
        if stored.dtype == torch.int8 and columns is not None:
            wanted.add((rows, columns // 2))
            is_exact = f"{name}{_EXACT_SCALE}" in self._tensors
            self._check_scales(f"{name}{_EXACT_SCALE if is_exact else _SCALE}", rows, columns)
        if stored.shape not in wanted or (stored.dtype == torch.int8 and columns is None):
            raise TensorShapeError(
                f"{self.path}: {name} is {stored.dtype} {list(stored.shape)}, config.json says {rows} x {columns or 1}"
            )

    def _check_scales(self, name: str, rows: int, columns: int) -> None:
        scales = self._tensors.get(name)
        if scales is None:
            raise MissingTensorError(f"{self.path}: {name} is not in this file: convert the model again")
        fits = len(scales.shape) == 2 and scales.shape[0] == rows and scales.shape[1] and not columns % scales.shape[1]
        if not fits or not scales.dtype.is_floating_point:
            raise TensorShapeError(
                f"{self.path}: {name} is {scales.dtype} {list(scales.shape)}, scales of {rows} x {columns} are due"
            )

    def _map(self, name: str) -> torch.Tensor:
        stored = self._tensors[name]
        first = stored.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            if _identity(file) != self._identity:
                raise _damaged(self.path, "it was replaced while it was being read")
            # A private copy of what nobody writes: torch warns of memory that is read-only.
            size = stored.start - first + stored.num_bytes
            mapping = mmap.mmap(file.fileno(), size, offset=first, access=mmap.ACCESS_COPY)
        mapping.madvise(mmap.MADV_WILLNEED)
        flat = torch.frombuffer(mapping, dtype=stored.dtype, count=math.prod(stored.shape), offset=stored.start - first)
        return flat.view(stored.shape)


class _MappedParts(Mapping[str, StoredPart]):
    def __init__(self, file: PartFile, unit: Unit) -> None:
        self._file = file
        self._unit = unit

    def __getitem__(self, part: str) -> StoredPart:
        return self._file.part(self._unit.sources[part])

    def __contains__(self, part: object) -> bool:
        return part in self._unit.sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._unit.sources)

    def __len__(self) -> int:
        return len(self._unit.sources)


def _name(source: Source) -> str:
    return "+".join(source.names)


def _tensors(unit: Unit, parts: Mapping[str, StoredPart]) -> dict[str, torch.Tensor]:
    """The parts as named tensors, large ones first, which keeps all of them aligned."""
    tensors: dict[str, torch.Tensor] = {}
    for part, source in unit.sources.items():
        name, stored = _name(source), parts[part]
        if isinstance(stored, QuantizedWeight):
            scale = _EXACT_SCALE if stored.is_exact else _SCALE
            tensors |= {name: stored.values, f"{name}{scale}": stored.scales}
        else:
            tensors[name] = stored
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].numel() * item[1].itemsize, item[0])))


def _write(file: BinaryIO, tensors: Mapping[str, torch.Tensor], owner: str) -> Written:
    """Header and tensors; the digests, known only in the end, take a place that was kept for them."""
    entries = _entries(tensors)
    facts = _facts(entries, owner)
    file.write(_header(entries, owner, _NO_DIGEST, _NO_DIGEST))
    start = file.tell()
    digest = hashlib.sha256(facts)
    for tensor in tensors.values():
        # One tensor at a time: those on a GPU need not all be here at once.
        flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
        data = memoryview(flat.numpy().data)
        for first in range(0, len(data), _CHUNK_BYTES):
            chunk = data[first : first + _CHUNK_BYTES]
            digest.update(chunk)
            file.write(chunk)
    file.flush()
    header = _header(entries, owner, digest.hexdigest(), _sample_digest(file, start, facts))
    assert len(header) == start
    file.seek(0)
    file.write(header)
    return Written(file.seek(0, os.SEEK_END), digest.hexdigest())


def _entries(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    return entries


def _facts(entries: Mapping[str, Any], owner: str) -> bytes:
    """What a header says besides the digests, which cover it: types and places that were changed are noticed, too."""
    return json.dumps([entries, owner], sort_keys=True).encode()


def _header(entries: Mapping[str, Any], owner: str, sha256: str, sampled: str) -> bytes:
    metadata = {"sha256": sha256, "samples": sampled, "owner": owner}
    text = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _read_header(path: Path, file: BinaryIO) -> tuple[dict[str, str], dict[str, _Stored], int, bytes]:
    """Metadata, tensors by name, where the tensors begin, what digests cover; checked against the size of the file."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(_MOST_HEADER_BYTES, size - 8):
        raise _damaged(path, "it has no header")
    try:
        entries = json.loads(file.read(length))
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        tensors = {str(name): _entry(entry, length + 8) for name, entry in entries.items()}
        facts = _facts(entries, metadata.get("owner", ""))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is not readable: {error!r}") from error
    end = length + 8
    for stored in sorted(tensors.values(), key=lambda stored: stored.start):
        if stored.start != end:
            raise _damaged(path, "its tensors overlap or leave gaps")
        end += stored.num_bytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end}")
    return metadata, tensors, length + 8, facts


def _entry(entry: Mapping[str, Any], data_start: int) -> _Stored:
    dtype, shape, (start, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, start, end)):
        raise ValueError(f"{shape} at {start}-{end}")
    if not 1 <= len(shape) <= 2 or end - start != math.prod(shape) * dtype.itemsize or start == end:
        raise ValueError(f"{shape} at {start}-{end}")
    return _Stored(dtype, shape, data_start + start, end - start)


def _sample_digest(file: BinaryIO, start: int, facts: bytes) -> str:
    size = os.fstat(file.fileno()).st_size - start
    digest = hashlib.sha256(facts + size.to_bytes(8, "little"))
    for sample in samples(file, start, size):
        digest.update(sample)
    return digest.hexdigest()


def _full_digest(file: BinaryIO, start: int, facts: bytes) -> str:
    file.seek(start)
    digest = hashlib.sha256(facts)
    while chunk := file.read(_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _identity(file: BinaryIO) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_uid


def _damaged(path: Path, detail: str) -> ShardError:
    return ShardError(f"{path} is truncated or damaged ({detail}): convert the model again")
