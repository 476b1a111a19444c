"""Reads only the wanted tensors of a model directory, in every layout GLM models were published in.

Safetensors or `.bin`, one file or shards with an index. A shard is mapped into memory while its tensors are being
read and unmapped after, so that a process never holds much more than what it keeps.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open

from glm.config import load_config
from glm.errors import CheckpointError, LfsPointerError, MissingTensorError, ShardError, TensorShapeError
from glm.foreign_model import foreign_folder, foreign_names
from glm.json_file import MOST_BYTES, read_json_object
from glm.layout import Unit
from glm.lfs import is_lfs_pointer, lfs_complaint
from glm.quantization import StoredPart
from glm.small_file import is_file, read_whole
from glm.weights_only import why_unsafe
from glm.zip_shard import is_zip, zip_fault

# (index, single file), the preferred format first.
_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
_NUM_SAMPLES = 16
_SAMPLE_BYTES = 4096


class TensorSource(Protocol):
    """What the parts of a model are loaded from: a `Checkpoint`, or a `RandomCheckpoint`."""

    model_dir: Path

    def __contains__(self, name: str) -> bool: ...

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each wanted name; float tensors may be views of what is not theirs."""

    def fingerprint(self) -> str:
        """A short word that tells models apart."""


@runtime_checkable
class UnitSource(Protocol):
    """What has whole units of the network ready: a `ConvertedCheckpoint`, or a `CachedCheckpoint`."""

    model_dir: Path

    def __contains__(self, name: str) -> bool: ...

    def read_unit(self, unit: Unit) -> Mapping[str, StoredPart]:
        """The unit's parts; they may be read from a file only when asked for, each time."""

    def fingerprint(self) -> str:
        """A short word that tells models apart."""


ModelSource = TensorSource | UnitSource


class Checkpoint:
    """The tensors of one model directory by name; nothing is read before `read`."""

    def __init__(self, model_dir: Path) -> None:
        """Find the shards and check that each is there, whole and not a Git-LFS pointer.

        Raises:
            CheckpointError: or the subclass that says what is wrong with which file.
        """
        self.model_dir = model_dir
        self.shard_of = _find_shards(model_dir)

    def __contains__(self, name: str) -> bool:
        return name in self.shard_of

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each wanted name, checked against its wanted shape.

        A yielded tensor is a view of the mapped file, which stays mapped as long as the tensor lives.

        Raises:
            MissingTensorError: no shard has it.
            TensorShapeError: it has another shape.
            ShardError: its shard turns out to be damaged.
        """
        for shard, names in self._by_shard(shapes).items():
            for name, tensor in _read_shard(shard, names):
                _check_shape(shard, name, tensor.shape, shapes[name])
                yield name, tensor

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Look for the wanted names, and in the headers of safetensors for their shapes, without reading tensors.

        Raises as `read` does.
        """
        for shard, names in self._by_shard(shapes).items():
            if shard.suffix == ".safetensors":
                with _reading(shard), _mapped_safetensors(shard) as file:
                    present = set(file.keys())
                    for name in names:
                        shape = file.get_slice(_present(name, present, shard)).get_shape()
                        _check_shape(shard, name, shape, shapes[name])

    def _by_shard(self, names: Iterable[str]) -> dict[Path, list[str]]:
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.shard_of:
                raise self._missing(name)
            by_shard.setdefault(self.shard_of[name], []).append(name)
        return by_shard

    def _missing(self, name: str) -> MissingTensorError:
        what = foreign_names(self.shard_of, name)
        reason = what or "the download is incomplete or config.json belongs to another model"
        return MissingTensorError(f"{self.model_dir}: tensor {name} is in no shard; {reason}")

    def fingerprint(self) -> str:
        """A short word that tells models apart: config, shard names and sizes, and samples of every shard.

        Reads 64 KiB of each shard, so that two fine-tunes of one model differ without reading either whole.
        """
        keys = read_whole(self.model_dir / "config.json", CheckpointError, MOST_BYTES)
        digest = hashlib.sha256(keys)
        if b"rope_ratio" in keys and (scaling := load_config(self.model_dir).rotary_scaling) != 1.0:
            digest.update(f"positions / {scaling}".encode())  # other files decide it, which hosts may not share
        for shard in sorted(set(self.shard_of.values())):
            size = shard.stat().st_size
            digest.update(f"{shard.name}:{size}:".encode())
            with shard.open("rb") as file:
                for sample in samples(file, 0, size):
                    digest.update(sample)
        return digest.hexdigest()[:16]


def samples(file: BinaryIO, start: int, num_bytes: int) -> Iterator[bytes]:
    """16 samples of 4 KiB, evenly spread over a stretch of a file, its ends among them."""
    for sample in range(_NUM_SAMPLES):
        file.seek(start + max(0, num_bytes - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
        yield file.read(min(_SAMPLE_BYTES, num_bytes))


def _find_shards(model_dir: Path) -> dict[str, Path]:
    for index_name, file_name in _LAYOUTS:
        if is_file(model_dir / index_name, ShardError):
            return _read_index(model_dir / index_name)
        shard = model_dir / file_name
        if is_file(shard, ShardError):
            _check_shard(shard)
            return dict.fromkeys(_shard_names(shard), shard)
    names = ", ".join(name for layout in _LAYOUTS for name in layout)
    strays = sorted(p.name for p in model_dir.glob("*-of-*") if p.suffix in (".safetensors", ".bin"))
    hint = f"; {strays[0]} is there but its index is not: download the index" if strays else ""
    remedy = hint or (
        f": complete the download (in a clone `git lfs pull`; else `hf download ORG/NAME --local-dir {model_dir}`), or "
        "name the directory that has them"
    )
    what = foreign_folder(model_dir)
    raise CheckpointError(what or f"{model_dir} has no weights: none of {names} is there{remedy}")


def _read_index(index: Path) -> dict[str, Path]:
    with _reading(index):
        if is_lfs_pointer(index):
            raise LfsPointerError(lfs_complaint(index))
    found = read_json_object(index, ShardError)
    try:
        entries = [(str(name), str(shard)) for name, shard in found["weight_map"].items()]
    except (KeyError, AttributeError) as error:
        raise ShardError(f"{index} is not a readable weight index ({error!r}): download it again") from error
    for file_name in sorted({file_name for _, file_name in entries}):
        if Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise ShardError(f"{index} names {file_name!r:.200}, which is not a file of its own directory: refused")
        shard = index.parent / file_name
        with _reading(index):
            is_there = len(file_name) < 256 and shard.is_file()
        if not is_there:
            raise ShardError(f"{index} names {file_name:.200}, which is not there: download that shard")
        _check_shard(shard)
    return {name: index.parent / file_name for name, file_name in entries}


def _check_shard(shard: Path) -> None:
    """Cheap checks that catch an interrupted download before anything is loaded."""
    with _reading(shard):
        if is_lfs_pointer(shard):
            raise LfsPointerError(lfs_complaint(shard))
        if shard.suffix == ".safetensors":
            with _mapped_safetensors(shard):
                return
        _check_reader(shard)


def _check_reader(shard: Path) -> None:
    """Refuse a `.bin` where torch's weights-only reader is known to have holes, and one that would unpack to no end."""
    reason = why_unsafe(torch.__version__)
    if reason is not None:
        raise ShardError(f"{shard} is not read: {reason}, or get the weights as safetensors")
    fault = zip_fault(shard) if is_zip(shard) else None
    if fault is not None:
        raise _truncated(shard, fault)


def _truncated(shard: Path, detail: str) -> ShardError:
    return ShardError(f"{shard} is truncated or damaged at {shard.stat().st_size} bytes ({detail}): download it again")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error


@contextmanager
def _mapped_safetensors(shard: Path) -> Iterator[safe_open]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise _truncated(shard, str(error)) from error


def _mapped_bin(shard: Path) -> dict[str, torch.Tensor]:
    """The dict of tensors a `.bin` holds, through torch's weights-only reader, mapped if it is of the zip format.

    The older format, which cannot be mapped, is read whole.
    """
    _check_reader(shard)
    try:
        tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=is_zip(shard))
    except OSError:
        raise
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and more for a damaged file
        raise _unreadable_bin(shard, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ShardError(f"{shard} does not hold a dict of tensors: it is not a published checkpoint shard")
    return tensors


def _unreadable_bin(shard: Path, error: Exception) -> ShardError:
    """Torch's own words are left out where they advise to read the file unsafely."""
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:
        return ShardError(
            f"{shard} holds more than tensors: it asks for {foreign[1]}, which is never run; get the weights as "
            "safetensors, or from their publisher"
        )
    is_advice = "weights_only" in str(error) or not str(error)
    return _truncated(shard, "unreadable" if is_advice else str(error).splitlines()[0])


def _shard_names(shard: Path) -> list[str]:
    if shard.suffix == ".safetensors":
        with _mapped_safetensors(shard) as file:
            return list(file.keys())
    return list(_mapped_bin(shard))


def _read_shard(shard: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    with _reading(shard):
        if shard.suffix == ".safetensors":
            with _mapped_safetensors(shard) as file:
                present = set(file.keys())
                for name in names:
                    yield name, file.get_tensor(_present(name, present, shard))
        else:
            tensors = _mapped_bin(shard)
            for name in names:
                yield name, tensors[_present(name, tensors, shard)].detach()


def _check_shape(shard: Path, name: str, shape: Sequence[int], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != wanted:
        raise TensorShapeError(f"{shard}: tensor {name} has shape {list(shape)}, config.json implies {list(wanted)}")


def _present(name: str, names: Collection[str], shard: Path) -> str:
    if name not in names:
        raise MissingTensorError(f"{shard}: the index says tensor {name} is here, but it is not: download it again")
    return name
