"""From named tensors on disk to the parts a block or an end is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from glm.checkpoint import ModelSource, TensorSource, UnitSource
from glm.config import ModelConfig
from glm.errors import CheckpointError
from glm.kernels.cuda.kernels import CudaKernels, cuda_kernels
from glm.kernels.native import NativeKernels, best_kernels
from glm.kernels.step import StepKernels
from glm.layout import Source, Unit
from glm.linear import Kernels, Linear, Weight, make_linear, make_weight, owned, pack
from glm.precision import Precision, compute_dtype, sum_in_fp32
from glm.quantization import QuantizedWeight, StoredPart


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a part is held: `dtype` is that of activations, and of what is never quantised (norms, biases).

    `kernels` compute where they know the kind of weight; torch does where there are none.
    """

    precision: Precision
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels

    @property
    def step_kernels(self) -> StepKernels | None:
        """The kernels if they do more than linear layers with tensors so placed."""
        if not isinstance(self.kernels, NativeKernels | CudaKernels):
            return None
        return self.kernels if self.kernels.can_step(torch.empty(0, dtype=self.dtype, device=self.device)) else None

    @property
    def attention_kernels(self) -> NativeKernels | None:
        """The kernels if they attend with tensors so placed, too."""
        kernels = self.step_kernels
        return kernels if isinstance(kernels, NativeKernels) else None


def place(precision: Precision, device: torch.device, config: ModelConfig) -> Placement:
    """A placement that computes as fast as it can there."""
    dtype = compute_dtype(precision, device, config)
    if device.type != "cuda":
        return Placement(precision, dtype, device, best_kernels())
    sum_in_fp32()
    return Placement(precision, dtype, device, cuda_kernels(device, dtype))


def read_parts(checkpoint: ModelSource, unit: Unit, config: ModelConfig) -> Mapping[str, StoredPart]:
    """Read the parts as stored; fused ones are concatenated, published quantised ones keep their packing.

    Parts may be views of a mapped file.
    """
    if isinstance(checkpoint, UnitSource):
        return checkpoint.read_unit(unit)
    sources = unit.sources
    shapes: dict[str, tuple[int, ...]] = {}
    for source in sources.values():
        shapes |= wanted_shapes(checkpoint, source, config)
    tensors = dict(checkpoint.read(shapes))
    return {part: _assemble(source, tensors, config) for part, source in sources.items()}


def wanted_shapes(checkpoint: TensorSource, source: Source, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name of the tensors that a part is made of, with its scales where it was published quantised."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in source.shapes.items():
        if f"{name}_scale" not in checkpoint:
            shapes[name] = shape
            continue
        if config.quantization_bits is None:
            raise CheckpointError(
                f"{checkpoint.model_dir}: {name}_scale says the weights are quantised, but config.json has no "
                "quantization_bit: use the config.json published with them"
            )
        shapes[name] = (shape[0], shape[1] * config.quantization_bits // 8)
        shapes[f"{name}_scale"] = (shape[0],)
    return shapes


def _assemble(source: Source, tensors: Mapping[str, torch.Tensor], config: ModelConfig) -> StoredPart:
    first = source.names[0]
    if f"{first}_scale" in tensors and config.quantization_bits is not None:
        scales = tensors[f"{first}_scale"].view(-1, 1)
        return QuantizedWeight(tensors[first], scales, config.quantization_bits, is_exact=True)
    stored = [tensors[name] for name in source.names]
    for name, tensor in zip(source.names, stored, strict=True):
        if not tensor.is_floating_point():
            raise CheckpointError(f"tensor {name} is {tensor.dtype} without scales: this quantisation is not supported")
    return stored[0] if len(stored) == 1 else torch.cat(stored)


def quantized(parts: Mapping[str, StoredPart], precision: Precision, device: torch.device) -> dict[str, StoredPart]:
    """The parts with all matrices at a quantised precision, on `device`; a published one keeps its integers."""
    return {
        name: make_weight(part, precision, torch.float32, device)
        if isinstance(part, QuantizedWeight) or part.dim() == 2
        else part.clone()  # a view would keep the whole mapped file in memory
        for name, part in parts.items()
    }


def build_weight(stored: StoredPart, placement: Placement) -> Weight:
    """A weight at the placement's precision, owning its memory; packed at once where that is all it takes."""
    if isinstance(stored, QuantizedWeight) and stored.bits == placement.precision.bits:
        packed = pack(stored, placement.kernels if placement.device.type == "cpu" else None)
        if packed is not stored:
            return packed
    return make_weight(stored, placement.precision, placement.dtype, placement.device)


def build_linear(parts: Mapping[str, StoredPart], name: str, placement: Placement) -> Linear:
    """The linear layer `name`, from `name.weight` and, where there is one, `name.bias`."""
    bias = build_vector(parts, f"{name}.bias", placement) if f"{name}.bias" in parts else None
    return make_linear(build_weight(parts[f"{name}.weight"], placement), bias, placement.kernels)


def build_vector(parts: Mapping[str, StoredPart], name: str, placement: Placement) -> torch.Tensor:
    """The vector `name` in the placement's dtype."""
    part = parts[name]
    assert isinstance(part, torch.Tensor)
    return owned(part, placement.dtype, placement.device)
