"""Reads only the wanted tensors of a model directory, in every layout GLM models were published in.

Safetensors or `.bin`, one file or shards with an index. A shard is mapped into memory while its tensors are being
read and unmapped after, so that a process never holds much more than what it keeps.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from glm.errors import CheckpointError, LfsPointerError, MissingTensorError, ShardError, TensorShapeError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_LFS_MAGIC = b"version https://git-lfs"


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

        A yielded tensor is a view of the mapped file: copy what is to be kept before the next one is asked for.
        """
        by_shard: dict[Path, list[str]] = {}
        for name in shapes:
            if name not in self.shard_of:
                raise MissingTensorError(
                    f"{self.model_dir}: tensor {name} is in no shard; the download is incomplete or config.json "
                    "belongs to another model"
                )
            by_shard.setdefault(self.shard_of[name], []).append(name)
        for shard, names in by_shard.items():
            for name, tensor in _read_shard(shard, names):
                if tuple(tensor.shape) != shapes[name]:
                    raise TensorShapeError(
                        f"{shard}: tensor {name} has shape {list(tensor.shape)}, config.json implies "
                        f"{list(shapes[name])}"
                    )
                yield name, tensor

    def fingerprint(self) -> str:
        """A short word that differs when config, shard names, sizes or headers differ (reads a few KiB a shard)."""
        digest = hashlib.sha256((self.model_dir / "config.json").read_bytes())
        for shard in sorted(set(self.shard_of.values())):
            size = shard.stat().st_size
            digest.update(f"{shard.name}:{size}:".encode())
            with shard.open("rb") as file:
                digest.update(file.read(4096))
                file.seek(max(0, size - 4096))
                digest.update(file.read(4096))
        return digest.hexdigest()[:16]


def _find_shards(model_dir: Path) -> dict[str, Path]:
    for index_name in _INDEXES:
        if (model_dir / index_name).is_file():
            return _read_index(model_dir / index_name)
    for file_name in _SINGLE_FILES:
        shard = model_dir / file_name
        if shard.is_file():
            _check_shard(shard)
            return dict.fromkeys(_shard_names(shard), shard)
    names = ", ".join((*_INDEXES, *_SINGLE_FILES))
    raise CheckpointError(f"{model_dir} has no weights: expected one of {names}")


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = [(str(name), str(file_name)) for name, file_name in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if _is_lfs_pointer(index):
            raise _lfs_error(index) from None
        raise ShardError(f"{index} is not a readable weight index ({error!r}): download it again") from error
    for file_name in sorted({file_name for _, file_name in entries}):
        if Path(file_name).name != file_name or file_name in ("", ".", ".."):
            raise ShardError(f"{index} names {file_name!r}, which is not a file of its own directory: refused")
        shard = index.parent / file_name
        if not shard.is_file():
            raise ShardError(f"{index} names {file_name}, which is not there: download that shard")
        _check_shard(shard)
    return {name: index.parent / file_name for name, file_name in entries}


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS_MAGIC)) == _LFS_MAGIC


def _lfs_error(path: Path) -> LfsPointerError:
    return LfsPointerError(
        f"{path} is a Git-LFS pointer of {path.stat().st_size} bytes, not the file itself: run `git lfs pull` in its "
        "directory or download it again"
    )


def _check_shard(shard: Path) -> None:
    """Cheap checks that catch an interrupted download before anything is loaded."""
    if _is_lfs_pointer(shard):
        raise _lfs_error(shard)
    if shard.suffix == ".safetensors":
        with _mapped_safetensors(shard):
            return
    size = shard.stat().st_size
    with shard.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
        file.seek(max(0, size - 65557))
        if is_zip and b"PK\x05\x06" not in file.read():
            raise _truncated(shard)


def _truncated(shard: Path, detail: str = "its end is missing") -> ShardError:
    return ShardError(f"{shard} is truncated or damaged at {shard.stat().st_size} bytes ({detail}): download it again")


@contextmanager
def _mapped_safetensors(shard: Path) -> Iterator[safe_open]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise _truncated(shard, str(error)) from error
    except OSError as error:
        raise ShardError(f"{shard} cannot be read: {error}") from error


def _mapped_bin(shard: Path) -> dict[str, torch.Tensor]:
    """The dict of tensors a `.bin` holds, through torch's weights-only reader, mapped where its format allows."""
    try:
        try:
            tensors = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            tensors = torch.load(shard, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError and more for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _truncated(shard, reason) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ShardError(f"{shard} does not hold a dict of tensors: it is not a published checkpoint shard")
    return tensors


def _shard_names(shard: Path) -> list[str]:
    if shard.suffix == ".safetensors":
        with _mapped_safetensors(shard) as file:
            return list(file.keys())
    return list(_mapped_bin(shard))


def _read_shard(shard: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    def absent(name: str) -> MissingTensorError:
        return MissingTensorError(f"{shard}: the index says tensor {name} is here, but it is not: download it again")

    if shard.suffix == ".safetensors":
        with _mapped_safetensors(shard) as file:
            present = set(file.keys())
            for name in names:
                if name not in present:
                    raise absent(name)
                yield name, file.get_tensor(name)
    else:
        tensors = _mapped_bin(shard)
        for name in names:
            if name not in tensors:
                raise absent(name)
            yield name, tensors.pop(name)
