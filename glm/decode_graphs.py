"""CUDA graphs for decode: all of a layer but its attention is recorded once and replayed with one call.

Attention stays as it is, because its caches grow and move. What lies between two attentions has the same shapes at
every step: the end of one layer and the beginning of the next are one graph. Nobody has run this on a card yet, so it
is off unless `GLMPIPE_CUDA_GRAPHS=1` asks for it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from glm.attention import Geometry, attend
from glm.block import Block, Opened
from glm.config import ModelConfig
from glm.kernels.cuda.kernels import MOST_FUSED_TOKENS
from glm.rotary import Rotary, RotaryTable
from glm.weights import Placement

Run = Callable[[], tuple[torch.Tensor, ...]]
Capture = Callable[[Run], tuple[tuple[torch.Tensor, ...], Callable[[], None]]]
"""Records a function of tensors that stay where they are: its outputs, and what computes them again in place."""


@dataclass(slots=True)
class _Recording:
    """The graphs for one number of tokens; `hidden`, `rotary` and `context` are what they read."""

    hidden: torch.Tensor
    rotary: RotaryTable
    context: torch.Tensor
    opened: list[Opened] = field(default_factory=list)
    replays: list[Callable[[], None]] = field(default_factory=list)
    out: torch.Tensor | None = None


class DecodeGraphs:
    """Runs the blocks of a range for few tokens; `note` says why it no longer does, if it does not."""

    def __init__(self, blocks: Sequence[Block], config: ModelConfig, placement: Placement, capture: Capture) -> None:
        self.note = ""
        self._blocks, self._config, self._placement, self._capture = blocks, config, placement, capture
        self._recordings: dict[int, _Recording] = {}

    @torch.inference_mode()
    def prepare(self, num_tokens: int) -> bool:
        """Record the graphs for so many tokens; False if that cannot be, for good."""
        if self.note or num_tokens > MOST_FUSED_TOKENS:
            return False
        if num_tokens not in self._recordings:
            try:
                self._recordings[num_tokens] = self._record(num_tokens)
            except RuntimeError as error:
                self._recordings.clear()
                self.note = f"CUDA graphs failed ({str(error).partition(chr(10))[0][:80]})"
        return not self.note

    def forward(self, hidden: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same, as the blocks give it; `prepare` must have agreed."""
        recording = self._recordings[len(hidden)]
        recording.hidden.copy_(hidden)
        recording.rotary.cos.copy_(geometry.rotary.cos)
        recording.rotary.sin.copy_(geometry.rotary.sin)
        recording.replays[0]()
        for layer, (opened, replay) in enumerate(zip(recording.opened, recording.replays[1:], strict=True)):
            recording.context.copy_(attend(geometry, layer, opened.query, opened.key, opened.value))
            replay()
        assert recording.out is not None
        return recording.out.clone()

    def _record(self, num_tokens: int) -> _Recording:
        config, placement = self._config, self._placement

        def buffer(size: int) -> torch.Tensor:
            return torch.zeros(num_tokens, size, dtype=placement.dtype, device=placement.device)

        table = Rotary(config, placement.device).table(torch.zeros(2, num_tokens, dtype=torch.int64))
        recording = _Recording(buffer(config.hidden_size), table, buffer(config.num_heads * config.head_dim))
        first, last = self._blocks[0], self._blocks[-1]
        self._add_opening(recording, lambda: first.open(recording.hidden, recording.rotary))
        for before, after in zip(self._blocks, self._blocks[1:], strict=False):
            residual = recording.opened[-1].residual

            def between(before: Block = before, after: Block = after, residual: torch.Tensor = residual) -> Opened:
                return after.open(before.close(residual, recording.context), recording.rotary)

            self._add_opening(recording, between)
        residual = recording.opened[-1].residual
        (recording.out,), replay = self._capture(lambda: (last.close(residual, recording.context),))
        recording.replays.append(replay)
        return recording

    def _add_opening(self, recording: _Recording, run: Callable[[], Opened]) -> None:
        outputs, replay = self._capture(run)
        recording.opened.append(Opened(*outputs))
        recording.replays.append(replay)


def graphs_if_wanted(blocks: Sequence[Block], config: ModelConfig, placement: Placement) -> DecodeGraphs | None:
    """Graphs with those for one token recorded, where the environment asks for them and the device is a card."""
    if placement.device.type != "cuda" or os.environ.get("GLMPIPE_CUDA_GRAPHS") != "1":
        return None
    graphs = DecodeGraphs(blocks, config, placement, cuda_capture(placement.device))
    graphs.prepare(1)
    return graphs


def cuda_capture(device: torch.device) -> Capture:
    """Records CUDA graphs that share their memory, and must be replayed in the order in which they were recorded."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Run) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
        with torch.cuda.device(device):
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                run()  # what libraries set up at a first call must not be recorded
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # The control thread may ask for free memory meanwhile: its calls are none of this recording's.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = run()
        return outputs, graph.replay

    return capture
