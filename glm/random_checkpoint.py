"""Weights out of nothing: a checkpoint of any shape, for measuring without a download and without a disk."""

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from glm.config import ModelConfig, load_config
from glm.errors import MissingTensorError, TensorShapeError
from glm.layout import embedding_source, lm_head_source, stored_shapes
from glm.shapes import PREFIX, SHAPES, random_shape

_POOL_SIZE = 1 << 23
_SPREAD = 0.02
_SEED = 1
_RECIPE = 2


class RandomCheckpoint:
    """Has the calls of `Checkpoint`, for the model `random:SHAPE`.

    Weights are normal with a spread of 0.02, as untrained models have them, norms are one, a tied
    lm_head is the embedding. All tensors are views of one
    pool of numbers: a matrix begins where its name says, and its rows overlap. Being made costs nothing, and once
    loaded (every precision copies) the weights take the memory and the time that real ones take. The same name gives
    the same values in every process.
    """

    def __init__(self, model_dir: Path) -> None:
        """Raises ModelNotFoundError: not a shape."""
        shape = random_shape(model_dir)
        assert shape is not None, model_dir
        self.model_dir = Path(PREFIX + shape)
        self._shape = shape
        config = load_config(self.model_dir)
        self._shapes = stored_shapes(config)
        self._embedding = embedding_source(config).names
        self._tied_head = lm_head_source(config).names[0] if config.tied_ends else None
        self._pool = _make_pool(config)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `(name, tensor)` for each wanted name, checked against its wanted shape.

        A yielded tensor is a view of the pool.

        Raises:
            MissingTensorError: the model has none of this name. TensorShapeError: it has another shape.
        """
        for name, shape in shapes.items():
            if name not in self._shapes:
                raise MissingTensorError(f"{self.model_dir}: a model of this shape has no tensor {name}")
            if shape != self._shapes[name]:
                raise TensorShapeError(
                    f"{self.model_dir}: tensor {name} has shape {list(self._shapes[name])}, not {list(shape)}"
                )
            yield name, self._tensor(name, shape)

    def fingerprint(self) -> str:
        """A short word that tells shapes, and ways of making numbers for them, apart."""
        recipe = json.dumps([SHAPES[self._shape], _POOL_SIZE, _SPREAD, _SEED, _RECIPE], sort_keys=True)
        return hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1 and "norm" in name and name.endswith("weight"):
            return torch.ones(shape, dtype=self._pool.dtype)
        num_rows, num_columns = shape if len(shape) == 2 else (1, *shape)
        step = min(num_columns, _POOL_SIZE // 2 // num_rows)
        num_used = (num_rows - 1) * step + num_columns
        if name == self._tied_head:
            (name,) = self._embedding
        start = zlib.crc32(name.encode()) % (_POOL_SIZE - num_used + 1)
        return self._pool.as_strided((num_rows, num_columns), (step, 1), start).view(shape)


def _make_pool(config: ModelConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(_POOL_SIZE, generator=generator).mul_(_SPREAD).to(getattr(torch, config.stored_dtype))
