"""A contiguous range of layers, and the undivided model that every split must equal."""

from collections.abc import Callable, Sequence

import torch

from glm.attention import Geometry, Segment, make_geometry
from glm.block import Block, make_block
from glm.checkpoint import ModelSource
from glm.config import ModelConfig
from glm.decode_graphs import DecodeGraphs, graphs_if_wanted
from glm.ends import Embedding, Head, end_placement
from glm.errors import SegmentError
from glm.kernels.layer import NativeStack
from glm.kv_cache import SequenceCache
from glm.layout import layer_unit
from glm.positions import prompt_layout
from glm.precision import Precision
from glm.rotary import Rotary
from glm.weights import Placement, place, read_parts

MOST_AT_ONCE = 8
"""Tokens that go through all layers in one native call, during which nothing can end it."""
LoadProgress = Callable[[int, int, int], None]
LayerObserver = Callable[[int, torch.Tensor], None]


class LayerStack:
    """The blocks of the layers [start, end) at one precision on one device."""

    def __init__(
        self,
        blocks: Sequence[Block],
        config: ModelConfig,
        start: int,
        placement: Placement,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.config = config
        self.start = start
        self.end = start + len(self.blocks)
        self.placement = placement
        self._graphs = graphs
        self._rotary = Rotary(config, placement.device)
        self._kernels = placement.attention_kernels
        natives = [block.native for block in self.blocks if block.native is not None]
        layers = [layer for native in natives for layer in native.layers]
        self.native = NativeStack(layers) if len(layers) == len(self.blocks) > 0 else None

    @classmethod
    def load(
        cls,
        checkpoint: ModelSource,
        config: ModelConfig,
        start: int,
        end: int,
        precision: Precision,
        device: torch.device,
        progress: LoadProgress | None = None,
    ) -> "LayerStack":
        """Read the layers one by one, tensor by tensor; never holds much more than its own weights.

        `progress(layers_done, layers_total, weight_bytes)` is called after each layer.

        Raises:
            CheckpointError: a tensor is missing or misshapen, a shard is damaged.
        """
        placement = place(precision, device, config)
        blocks: list[Block] = []
        for layer in range(start, end):
            # In one expression: no name keeps a layer as it was stored while the next one is read.
            blocks.append(make_block(read_parts(checkpoint, layer_unit(config, layer), config), config, placement))
            if progress is not None:
                progress(len(blocks), end - start, sum(block.num_bytes for block in blocks))
        return cls(blocks, config, start, placement, graphs_if_wanted(blocks, config, placement))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the linear layers (norms are a few KiB and not counted)."""
        return sum(block.num_bytes for block in self.blocks)

    @property
    def kernel_path(self) -> str:
        """Which arithmetic the linear layers take, for people."""
        path = self.blocks[0].kernel_path
        return path if self._graphs is None else f"{path}; {self._graphs.note or 'CUDA graphs'}"

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes in all layers of the range."""
        size = self.config.num_kv_heads * self.config.head_dim
        return 2 * len(self.blocks) * size * self.placement.dtype.itemsize

    def new_cache(self) -> SequenceCache:
        """An empty cache for one sequence."""
        config = self.config
        return SequenceCache(
            len(self.blocks),
            config.num_kv_heads,
            config.head_dim,
            self.placement.dtype,
            self.placement.device,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        segments: Sequence[Segment],
        observer: LayerObserver | None = None,
        before_layer: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] of all segments, one after the other, through the range.

        The new tokens' keys and values are appended to the segments' caches; if anything raises, the caches still
        hold what they held. `observer(layer, hidden)` sees what each layer (counted from 0 in the model) gives out.
        `before_layer()` may raise in order to end a long step; one of a few tokens, which is short, asks it once.

        Raises:
            CacheGapError: a segment does not start where its cache ends.
            SegmentError: the segments do not fit the hidden states or each other, or cut a prefix.
        """
        if torch.is_inference_mode_enabled():  # entering it again would take longer than all that is done here
            return self._forward(hidden, segments, observer, before_layer)
        with torch.inference_mode():
            return self._forward(hidden, segments, observer, before_layer)

    def _forward(
        self,
        hidden: torch.Tensor,
        segments: Sequence[Segment],
        observer: LayerObserver | None,
        before_layer: Callable[[], None] | None,
    ) -> torch.Tensor:
        num_tokens = sum([segment.num_tokens for segment in segments])
        if hidden.shape != (num_tokens, self.config.hidden_size):
            raise SegmentError(
                f"hidden states of shape {list(hidden.shape)} do not fit segments of {num_tokens} tokens in all and "
                f"a hidden size of {self.config.hidden_size}"
            )
        hidden = hidden.to(self.placement.device, self.placement.dtype)
        if not segments:
            return hidden
        geometry = make_geometry(segments, self._rotary, self.placement.device, self._kernels)
        for segment in segments:
            segment.cache.reserve(segment.start_pos + segment.num_tokens)
        if self._graphs is not None and observer is None and self._graphs.prepare(num_tokens):
            if before_layer is not None:
                before_layer()
            hidden = self._graphs.forward(hidden, geometry)
        elif observer is None and self.native is not None and num_tokens <= MOST_AT_ONCE:
            if before_layer is not None:
                before_layer()
            hidden = self.native(hidden, geometry.rotary.cos, geometry.rotary.sin, geometry.sequences(0))
        else:
            hidden = self._through_blocks(hidden, geometry, observer, before_layer)
        for segment in segments:
            segment.cache.commit(segment.num_tokens)
        return hidden

    def _through_blocks(
        self,
        hidden: torch.Tensor,
        geometry: Geometry,
        observer: LayerObserver | None,
        before_layer: Callable[[], None] | None,
    ) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            if before_layer is not None:
                before_layer()
            hidden = block(hidden, geometry, index)
            if observer is not None:
                observer(self.start + index, hidden)
        return hidden


class Model:
    """The undivided model: what one process computes when everything fits."""

    def __init__(self, embedding: Embedding, layers: LayerStack, head: Head) -> None:
        self.embedding = embedding
        self.layers = layers
        self.head = head
        self.config = layers.config

    @classmethod
    def load(
        cls,
        checkpoint: ModelSource,
        config: ModelConfig,
        precision: Precision = Precision.FP32,
        device: torch.device | None = None,
    ) -> "Model":
        """All layers and both ends at one precision on one device (default: the CPU)."""
        device = device or torch.device("cpu")
        placement = end_placement(precision, device, config)
        layers = LayerStack.load(checkpoint, config, 0, config.num_layers, precision, device)
        embedding = Embedding.load(checkpoint, config, placement, placement)
        return cls(embedding, layers, Head.load(checkpoint, config, placement, placement, embedding))

    def greedy(self, prompt_ids: Sequence[int], num_new: int) -> list[int]:
        """The arg-max continuation of a prompt, end tokens not minded."""
        cache, layout = self.layers.new_cache(), prompt_layout(prompt_ids, self.config)
        ids, fed = list(prompt_ids), 0
        for _ in range(num_new):
            hidden = self.embedding.forward(torch.tensor(ids[fed:]))
            hidden = self.layers.forward(hidden, [Segment(cache, fed, len(ids) - fed, layout)])
            fed = len(ids)
            ids.append(int(self.head.forward(hidden[-1:]).argmax()))
        return ids[len(prompt_ids) :]
