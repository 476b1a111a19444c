"""Both ends of the model: token ids to hidden states, and hidden states to logits."""

import torch
from torch.nn import functional

from glm.checkpoint import ModelSource
from glm.config import ModelConfig
from glm.errors import GlmError
from glm.layout import Unit, embedding_unit, final_norm_unit, lm_head_unit
from glm.linear import Weight, make_linear, make_weight, owned, pack, tensor_bytes
from glm.norm import LayerNorm, RMSNorm
from glm.precision import Precision
from glm.quantization import QuantizedWeight
from glm.weights import Placement, build_vector, build_weight, place, read_parts


def end_placement(precision: Precision, device: torch.device, config: ModelConfig) -> Placement:
    """Where and how one part of an end is held."""
    return place(precision, device, config)


def stored_lm_head(checkpoint: ModelSource, config: ModelConfig) -> Unit:
    """What holds the output projection: a tied model may have it only as its embedding."""
    unit = lm_head_unit(config)
    is_shared = config.tied_ends and unit.sources["table"].names[0] not in checkpoint
    return embedding_unit(config) if is_shared else unit


def stored_embedding(checkpoint: ModelSource, config: ModelConfig) -> Unit:
    """What holds the word embedding: of a tied model that was saved once for both it may be lm_head alone."""
    unit, head = embedding_unit(config), lm_head_unit(config)
    is_there = unit.sources["table"].names[0] in checkpoint or head.sources["table"].names[0] not in checkpoint
    return unit if is_there or not config.tied_ends else head


def has_own_lm_head(checkpoint: ModelSource, config: ModelConfig) -> bool:
    """Whether a tied model's files hold an output projection that is not its embedding: the model is then made of that.

    Both are read and compared whole: a fine-tune may differ in a few rows.

    Raises:
        CheckpointError: one of them is damaged or misshapen.
    """
    units = stored_embedding(checkpoint, config), stored_lm_head(checkpoint, config)
    if not config.tied_ends or units[0] == units[1]:
        return False
    table, head = (read_parts(checkpoint, unit, config)["table"] for unit in units)
    if isinstance(head, QuantizedWeight) and isinstance(table, torch.Tensor):
        table = make_weight(table, Precision(f"int{head.bits}"), torch.float32, table.device)
    return not _is_same(table, head)


def _is_same(table: Weight, head: Weight) -> bool:
    if isinstance(table, QuantizedWeight) and isinstance(head, QuantizedWeight):
        return torch.equal(table.values, head.values) and torch.equal(table.scales, head.scales)
    if not isinstance(table, torch.Tensor) or not isinstance(head, torch.Tensor):
        return False
    return torch.equal(table, head) if table.dtype == head.dtype else torch.equal(table.float(), head.float())


class Embedding:
    """The word embedding, at a precision, on a device.

    A float table that only is looked up stays as narrow as it was stored; rows are widened when they are taken out.
    """

    def __init__(self, table: Weight, placement: Placement, *, is_shared: bool = False) -> None:
        self.table = table
        self.placement = placement
        self.is_shared = is_shared

    @classmethod
    def load(
        cls,
        checkpoint: ModelSource,
        config: ModelConfig,
        placement: Placement,
        lm_head: Placement | None = None,
        *,
        is_compared: bool = False,
    ) -> "Embedding":
        """Read the table. A tied model's serves lm_head too where that is held in the same way, and is no other;
        `is_compared` says that `has_own_lm_head` was asked already.

        Where it is not, lm_head has a copy of its own: quantised, that is read for every token in a fraction of the
        time, and takes little memory beside the table.

        Raises:
            CheckpointError: it is missing or misshapen.
        """
        stored = read_parts(checkpoint, stored_embedding(checkpoint, config), config)["table"]
        is_shared = config.tied_ends and lm_head == placement
        if is_shared and (is_compared or not has_own_lm_head(checkpoint, config)):
            return cls(pack(build_weight(stored, placement), placement.kernels), placement, is_shared=True)
        if isinstance(stored, torch.Tensor) and not placement.precision.is_quantized:
            is_narrow = torch.promote_types(stored.dtype, placement.dtype) == placement.dtype
            return cls(owned(stored, stored.dtype if is_narrow else placement.dtype, placement.device), placement)
        return cls(make_weight(stored, placement.precision, placement.dtype, placement.device), placement)

    @property
    def num_bytes(self) -> int:
        """Bytes of the table."""
        return tensor_bytes(self.table) if isinstance(self.table, torch.Tensor) else self.table.num_bytes

    @property
    def vocab_size(self) -> int:
        """Rows of the table."""
        return self.table.shape[0] if isinstance(self.table, torch.Tensor) else self.table.num_rows

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [num_tokens] -> [num_tokens, hidden_size] in the placement's dtype.

        Raises:
            GlmError: an id outside the vocabulary.
        """
        wrong = token_ids[(token_ids < 0) | (token_ids >= self.vocab_size)]
        if wrong.numel():
            raise GlmError(f"token id {int(wrong[0])} is outside the vocabulary of {self.vocab_size}")
        ids = token_ids.to(self.placement.device)
        if isinstance(self.table, torch.Tensor):
            return functional.embedding(ids, self.table).to(self.placement.dtype)
        return self.table.rows(ids).dequantize(self.placement.dtype)


class Head:
    """Final norm and output projection, each on a device of its own."""

    def __init__(
        self,
        norm: LayerNorm | RMSNorm,
        norm_placement: Placement,
        lm_head: Weight,
        lm_head_placement: Placement,
    ) -> None:
        self._norm = norm
        self._norm_placement = norm_placement
        self._lm_head = make_linear(lm_head, None, lm_head_placement.kernels)
        self._lm_head_placement = lm_head_placement

    @classmethod
    def load(
        cls,
        checkpoint: ModelSource,
        config: ModelConfig,
        norm: Placement,
        lm_head: Placement,
        embedding: Embedding | None = None,
    ) -> "Head":
        """Read both. A tied model's head uses the table of `embedding` where that was loaded for both.

        Raises:
            CheckpointError: one is missing or misshapen.
        """
        parts = read_parts(checkpoint, final_norm_unit(config), config)
        weight = build_vector(parts, "weight", norm)
        final_norm = (
            LayerNorm(weight, build_vector(parts, "bias", norm), config.norm_eps)
            if config.is_prefix_lm
            else RMSNorm(weight, config.norm_eps, norm.step_kernels)
        )
        if embedding is not None and embedding.is_shared and embedding.placement == lm_head:
            return cls(final_norm, norm, embedding.table, lm_head)
        stored = read_parts(checkpoint, stored_lm_head(checkpoint, config), config)["table"]
        return cls(final_norm, norm, build_weight(stored, lm_head), lm_head)

    @property
    def num_bytes(self) -> int:
        """Bytes of the output projection (the norm's few KiB are not counted)."""
        return self._lm_head.num_bytes

    @property
    def kernel_path(self) -> str:
        """Which arithmetic the output projection takes, for people."""
        return self._lm_head.path

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] of any dtype and device -> the same shape where the norm is."""
        return self._norm(hidden.to(self._norm_placement.device, self._norm_placement.dtype))

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] after the final norm -> fp32 [num_tokens, vocab_size] on the CPU."""
        placed = normed.to(self._lm_head_placement.device, self._lm_head_placement.dtype)
        return self._lm_head(placed).to("cpu", torch.float32)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] from the last layer -> fp32 logits [num_tokens, vocab_size] on the CPU."""
        return self.logits(self.final_norm(hidden))
