"""Converted models: a directory with weights quantised beforehand, a file a unit, and a manifest that lists them.

`glm.convert` writes them. config.json, the tokenizer and the rest of the small files lie beside, so that the directory
is a model like any other, of which any split reads only its own files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glm.config import load_config
from glm.errors import ManifestError, MissingTensorError, ShardError
from glm.json_file import MOST_BYTES, read_json_object
from glm.layout import Unit, all_units
from glm.lineage import MANIFEST as MANIFEST
from glm.lineage import Lineage
from glm.part_file import PartFile
from glm.precision import Precision
from glm.quantization import INT4_GROUP_SIZE, INT4_LEVELS, StoredPart
from glm.small_file import is_file, read_whole

FORMAT = "glmpipe converted model"
VERSION = 2
_AS_PUBLISHED = "as published"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Size of one file, and the SHA-256 of its tensors, their types and shapes included."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted model was made from and how, and the files by the names of their units."""

    source_name: str
    source_fingerprint: str
    precision: Precision
    lm_head_precision: Precision | None
    config: Mapping[str, Any]
    files: Mapping[str, FileFacts]
    lineage: Lineage | None = None
    """What it was found to descend from, also by files that are not here, of a layout that several models share."""

    def to_json(self) -> str:
        """The text of the file."""
        lm_head = self.lm_head_precision
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "source": {
                "name": self.source_name,
                "fingerprint": self.source_fingerprint,
                **({} if self.lineage is None else {"lineage": asdict(self.lineage)}),
            },
            "scheme": scheme(self.precision) | {"lm_head": lm_head.value if lm_head else _AS_PUBLISHED},
            "config": self.config,
            "files": {
                file_name(unit): {"bytes": facts.num_bytes, "sha256": facts.sha256}
                for unit, facts in self.files.items()
            },
        }
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"


def scheme(precision: Precision) -> dict[str, Any]:
    """What integers and scales follow from, besides the float weights; `group_size` None is a whole row."""
    is_grouped = precision is Precision.INT4
    return {
        "precision": precision.value,
        "bits": precision.bits,
        "group_size": INT4_GROUP_SIZE if is_grouped else None,
        "scale_levels": list(INT4_LEVELS) if is_grouped else [127],
    }


def file_name(unit: str) -> str:
    """The name of a unit's file."""
    return f"{unit}.safetensors"


def is_converted(model_dir: Path) -> bool:
    """Whether the directory is, or pretends to be, a converted model."""
    return is_file(model_dir / MANIFEST, ManifestError)


def read_manifest(model_dir: Path) -> Manifest:
    """The manifest of a converted model; that its files are there is not looked at.

    Raises:
        ManifestError: unreadable, of another version, or naming what cannot be.
    """
    path = model_dir / MANIFEST
    try:
        raw = read_json_object(path, ManifestError)
        if raw.get("format") != FORMAT:
            raise ManifestError(f"{path} is not the manifest of a converted model: convert the model again")
        if raw.get("version") != VERSION:
            raise ManifestError(
                f"{path} has version {raw.get('version')!r}, this glmpipe reads {VERSION}: convert the model again, or "
                "use the glmpipe that converted it"
            )
        return _parse(path, raw)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{path} is damaged ({error!r}): convert the model again") from error


def _parse(path: Path, raw: Mapping[str, Any]) -> Manifest:
    precision, lm_head = Precision(raw["scheme"]["precision"]), raw["scheme"]["lm_head"]
    if not precision.is_quantized or not isinstance(raw["config"], dict):
        raise ValueError("scheme or config")
    files = {}
    for name, facts in raw["files"].items():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ManifestError(f"{path} names {name!r}, which is not a file of its own directory: refused")
        num_bytes, sha256 = facts["bytes"], facts["sha256"]
        if type(num_bytes) is not int or num_bytes < 1 or not _SHA256.fullmatch(sha256):
            raise ValueError(f"{name}: {facts}")
        files[name.removesuffix(".safetensors")] = FileFacts(num_bytes, sha256)
    return Manifest(
        source_name=str(raw["source"]["name"]),
        source_fingerprint=str(raw["source"]["fingerprint"]),
        precision=precision,
        lm_head_precision=None if lm_head == _AS_PUBLISHED else Precision(lm_head),
        config=raw["config"],
        files=files,
    )


class ConvertedCheckpoint:
    """The weights of a converted model by units, as a `UnitSource`; nothing is read before it is asked for."""

    def __init__(self, model_dir: Path) -> None:
        """Check that manifest, config.json and files belong together, without reading what is in them.

        Raises:
            ManifestError: they do not. ShardError: a file is missing or has another size. ConfigError.
        """
        self.model_dir = model_dir
        self.manifest = read_manifest(model_dir)
        self._config = load_config(model_dir)
        units = {unit.name: unit for unit in all_units(self._config)}
        unknown = sorted(self.manifest.files.keys() - units.keys())
        missing = sorted(units.keys() - self.manifest.files.keys())
        if unknown or missing:
            fault = f"names {unknown[0]}, which this model does not have" if unknown else f"does not name {missing[0]}"
            raise ManifestError(f"{model_dir / MANIFEST} {fault}: config.json is another model's, or it was changed")
        self._names = {n for unit in units.values() for source in unit.sources.values() for n in source.names}
        for unit, facts in self.manifest.files.items():
            _check_size(model_dir / file_name(unit), facts)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read_unit(self, unit: Unit) -> Mapping[str, StoredPart]:
        """The unit's parts, each mapped when it is asked for.

        Raises:
            ShardError: the file is damaged, or is not the one that the manifest names.
            MissingTensorError, TensorShapeError: it holds something else.
        """
        if unit.name not in self.manifest.files:
            raise MissingTensorError(f"{self.model_dir} has no {unit.name}: config.json belongs to another model")
        return self._open(unit.name).parts(unit)

    def check(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        """Read every file whole and compare its SHA-256 with the manifest's.

        `progress` is called with a unit's name before it is read, and the bytes read and to be read in all.

        Raises:
            ShardError: a file is not what was written.
        """
        total, done = sum(facts.num_bytes for facts in self.manifest.files.values()), 0
        for unit, facts in self.manifest.files.items():
            progress(unit, done, total)
            self._open(unit).check()
            done += facts.num_bytes

    def fingerprint(self) -> str:
        """A short word that tells models apart: the manifest has the checksums of all weights."""
        texts = [read_whole(self.model_dir / n, ManifestError, MOST_BYTES) for n in ("config.json", MANIFEST)]
        return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]

    def _open(self, unit: str) -> PartFile:
        path = self.model_dir / file_name(unit)
        file = PartFile(path)
        if file.sha256 != self.manifest.files[unit].sha256:
            raise ShardError(f"{path} is not the file that {MANIFEST} names, its checksum differs: convert again")
        return file


def _check_size(path: Path, facts: FileFacts) -> None:
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path} is named by {MANIFEST} and cannot be read ({error.strerror}): copy it too") from error
    if num_bytes != facts.num_bytes:
        raise ShardError(f"{path} has {num_bytes} bytes, {MANIFEST} says {facts.num_bytes}: copy it again")
