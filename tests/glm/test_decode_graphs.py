"""Recording and replaying parts of layers changes no bit; a recorder in Python stands in for CUDA graphs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glm.attention import Segment
from glm.block import CausalBlock, PrefixBlock
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.decode_graphs import DecodeGraphs, Run, graphs_if_wanted
from glm.kernels.cuda.kernels import MOST_FUSED_TOKENS
from glm.model import LayerStack
from glm.precision import Precision
from tests.tiny_checkpoints import FAMILIES, write_checkpoint

CPU = torch.device("cpu")
num_replays = 0


def record(run: Run) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
    """As a graph: outputs stay where they are, and are not right before a replay."""
    outputs = tuple(torch.full_like(output, torch.nan) for output in run())

    def replay() -> None:
        global num_replays
        num_replays += 1
        for output, found in zip(outputs, run(), strict=True):
            output.copy_(found)

    return outputs, replay


def load(model_dir: Path, precision: Precision) -> tuple[LayerStack, LayerStack]:
    """The same layers without and with graphs, part by part as on a card."""
    config = load_config(model_dir)
    plain = LayerStack.load(Checkpoint(model_dir), config, 0, config.num_layers, precision, CPU)
    for block in plain.blocks:
        assert isinstance(block, CausalBlock | PrefixBlock)
        block.native = None
    plain.native = None
    graphs = DecodeGraphs(plain.blocks, config, plain.placement, record)
    return plain, LayerStack(plain.blocks, config, 0, plain.placement, graphs)


def steps(stack: LayerStack, sizes: list[list[int]]) -> list[torch.Tensor]:
    """Outputs of steps of several sequences, each step so many tokens of each; and all that was cached."""
    generator = torch.Generator().manual_seed(0)
    caches = [stack.new_cache() for _ in sizes[0]]
    found = []
    for step in sizes:
        segments = [Segment(cache, cache.length, n) for cache, n in zip(caches, step, strict=True) if n]
        hidden = torch.randn(sum(step), stack.config.hidden_size, generator=generator)
        found.append(stack.forward(hidden, segments))
    layers = range(len(stack.blocks))
    return found + [part(layer).clone() for cache in caches for layer in layers for part in (cache.key, cache.value)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.INT8])
def test_bit_for_bit(family: str, precision: Precision, tmp_path: Path) -> None:
    """Prefill, decode of one and of several sequences together, several tokens at once; outputs and caches."""
    write_checkpoint(tmp_path, FAMILIES[family])
    plain, graphed = load(tmp_path, precision)
    sizes = [[20, 3], [1, 0], [0, 1], [1, 1], [1, 1], [2, 1], [1, 0]]
    before = num_replays
    for found, wanted in zip(steps(graphed, sizes), steps(plain, sizes), strict=True):
        assert torch.equal(found, wanted)
    few = [step for step in sizes if sum(step) <= MOST_FUSED_TOKENS]
    assert num_replays - before == len(few) * (len(plain.blocks) + 1)
    assert graphed.kernel_path == f"{plain.kernel_path}; CUDA graphs"


def test_a_recording_that_fails(tmp_path: Path) -> None:
    """The step is done without, as are all later ones; the reason is told."""
    write_checkpoint(tmp_path, FAMILIES["chatglm2"])
    plain, _ = load(tmp_path, Precision.FP32)

    def fail(run: Run) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nlong advice")

    graphs = DecodeGraphs(plain.blocks, plain.config, plain.placement, fail)
    failing = LayerStack(plain.blocks, plain.config, 0, plain.placement, graphs)
    sizes = [[3], [1], [1]]
    for found, wanted in zip(steps(failing, sizes), steps(plain, sizes), strict=True):
        assert torch.equal(found, wanted)
    reason = "CUDA graphs failed (CUDA error: operation not permitted when stream is capturing)"
    assert failing.kernel_path == f"{plain.kernel_path}; {reason}"


def test_an_observer_sees_every_layer(tmp_path: Path) -> None:
    """Recordings keep what lies between layers to themselves, so they are not used then."""
    write_checkpoint(tmp_path, FAMILIES["chatglm2"])
    _, graphed = load(tmp_path, Precision.FP32)
    seen: list[int] = []
    hidden = torch.randn(1, graphed.config.hidden_size)
    graphed.forward(hidden, [Segment(graphed.new_cache(), 0, 1)], lambda layer, _: seen.append(layer))
    assert seen == list(range(graphed.config.num_layers))


def test_off_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never on a CPU."""
    write_checkpoint(tmp_path, FAMILIES["chatglm2"])
    plain, _ = load(tmp_path, Precision.FP32)
    assert graphs_if_wanted(plain.blocks, plain.config, plain.placement) is None
    monkeypatch.setenv("GLMPIPE_CUDA_GRAPHS", "1")
    assert graphs_if_wanted(plain.blocks, plain.config, plain.placement) is None
