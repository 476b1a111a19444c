"""What the parts of a model are loaded from, whatever kind of model was named."""

from dataclasses import dataclass
from pathlib import Path

from glm.checkpoint import Checkpoint, ModelSource
from glm.config import ModelConfig, load_config
from glm.converted import ConvertedCheckpoint, is_converted, read_manifest
from glm.ends import stored_embedding, stored_lm_head
from glm.errors import ManifestError
from glm.foreign_model import UNFINISHED, foreign_folder
from glm.layout import all_units
from glm.random_checkpoint import RandomCheckpoint
from glm.shapes import random_shape
from glm.small_file import is_file
from glm.weights import wanted_shapes


def open_checkpoint(model_dir: Path) -> ModelSource:
    """The weights of a model directory, as published or converted, or of `random:SHAPE`.

    Raises:
        CheckpointError: or the subclass that says what is wrong with which file. ModelNotFoundError: not a shape.
    """
    if random_shape(model_dir) is not None:
        return RandomCheckpoint(model_dir)
    _check_finished(model_dir)
    return ConvertedCheckpoint(model_dir) if is_converted(model_dir) else Checkpoint(model_dir)


def _check_finished(model_dir: Path) -> None:
    """Raises ManifestError: somebody converts a model into this directory, or was killed when they did."""
    if is_file(model_dir / UNFINISHED, ManifestError):
        raise ManifestError(str(foreign_folder(model_dir)))


def check_weights(source: ModelSource, config: ModelConfig) -> None:
    """Look for everything that the model needs, as far as headers and an index tell, before anything is loaded.

    A converted model's files were looked for when it was opened.

    Raises:
        CheckpointError: or the subclass that says what is missing or has another shape.
    """
    if not isinstance(source, Checkpoint):
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for unit in (stored_embedding(source, config), *all_units(config)[1:-1], stored_lm_head(source, config)):
        for part in unit.sources.values():
            shapes |= wanted_shapes(source, part, config)
    source.check(shapes)


@dataclass(frozen=True, slots=True)
class MadeFor:
    """What a model's weights are like on disk, as a plan wants to know: see `coordinator.planning.plan_for`.

    `is_quantized` says that lm_head is to be left as it is stored.
    """

    is_quantized: bool = False
    precision: str | None = None
    lm_head_precision: str | None = None


def made_for(model_dir: Path) -> MadeFor:
    """Published quantised, converted, or neither.

    Raises:
        ConfigError: config.json is not usable. ManifestError: the directory says that it is converted, and not how.
    """
    _check_finished(model_dir)
    is_published = load_config(model_dir).quantization_bits is not None
    if random_shape(model_dir) is not None or not is_converted(model_dir):
        return MadeFor(is_published)
    manifest = read_manifest(model_dir)
    head = manifest.lm_head_precision
    return MadeFor(head is None, manifest.precision.value, head.value if head else None)
