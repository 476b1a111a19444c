"""What may lie in the cache of quantised layers, or beside an honest manifest: the true weights, or an error."""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch

from fuzz.files import QUICK_DIR, mutate, packed, unpacked
from fuzz.target import Finding, Target
from glm import layer_cache
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.convert import convert
from glm.converted import MANIFEST, ConvertedCheckpoint
from glm.errors import GlmError
from glm.layer_cache import entries, with_cache
from glm.layout import all_units
from glm.model_source import ModelSource
from glm.precision import Precision
from glm.quantization import QuantizedWeight, StoredPart
from glm.weights import read_parts
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

_KEYS = {**CAUSAL, "num_layers": 2, "padded_vocab_size": 32, "ffn_hidden_size": 32, "torch_dtype": "bfloat16"}
Weights = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    """A model, what its cache (an entry of this name) and its conversion hold, and the weights of both."""

    model: Mapping[str, bytes]
    entry: str
    cached: Mapping[str, bytes]
    cached_weights: Weights
    converted: Mapping[str, bytes]
    converted_weights: Weights


@cache
def _sample() -> _Sample:
    with tempfile.TemporaryDirectory(dir=QUICK_DIR) as name:
        root = Path(name)
        write_checkpoint(root / "model", _KEYS)
        cached_weights = _through_cache(root)
        (entry,) = (root / "cache").iterdir()
        convert(root / "model", root / "converted", Precision.INT8, None)
        return _Sample(
            _files(root / "model"),
            entry.name,
            _files(entry),
            cached_weights,
            _files(root / "converted"),
            _weights(ConvertedCheckpoint(root / "converted"), root / "converted"),
        )


def seeds() -> list[bytes]:
    """What was honestly kept, and honestly converted."""
    return [packed(_sample().cached), packed(_sample().converted)]


def check(data: bytes) -> None:
    """Spoiled files give the weights they gave before, made anew if need be, or one error; never others."""
    files, sample = unpacked(data), _sample()
    with tempfile.TemporaryDirectory(dir=QUICK_DIR) as name:
        root = Path(name)
        _write(root / "model", sample.model)
        if MANIFEST in files:
            honest = {name: sample.converted[name] for name in ("config.json", MANIFEST)}
            _write(root / "converted", {**files, **honest})
            with suppress(GlmError):
                checkpoint = ConvertedCheckpoint(root / "converted")
                checkpoint.check()
                if _weights(checkpoint, root / "converted") != sample.converted_weights:
                    raise Finding("a converted model has other weights than its manifest says")
            return
        _write(root / "cache" / sample.entry, files)
        entries(root / "cache")
        for _ in range(2):
            if _through_cache(root) != sample.cached_weights:
                raise Finding("the cache changes the weights")


def _through_cache(root: Path) -> Weights:
    checkpoint, config = Checkpoint(root / "model"), load_config(root / "model")
    source = with_cache(checkpoint, config, Precision.INT4, torch.device("cpu"), root / "cache")
    with patch.object(layer_cache, "LEAST_UNIT_BYTES", 0):  # keep even the layers of tiny models
        return _weights(source, root / "model")


def _weights(source: ModelSource, model_dir: Path) -> Weights:
    """All that arithmetic sees of a model, to be compared."""
    config = load_config(model_dir)
    parts = [(unit.name, read_parts(source, unit, config)) for unit in all_units(config)]
    return tuple((unit, name, *_facts(found[name])) for unit, found in parts for name in found)


def _facts(part: StoredPart) -> Weights:
    if isinstance(part, QuantizedWeight):
        return (part.bits, part.is_exact, *_facts(part.values), *_facts(part.scales))
    return (part.dtype, tuple(part.shape), part.contiguous().view(torch.uint8).numpy().tobytes())


def _files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


QUANTIZED = Target("quantized", seeds, mutate, check)
