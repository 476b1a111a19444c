"""A layer in one native call against the same layer part by part: every family, precision and instruction set."""

from pathlib import Path

import pytest
import torch

from glm import weights
from glm.attention import Segment
from glm.block import CausalBlock, PrefixBlock
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.kernels.native import INSTRUCTION_SETS, NativeKernels, load_kernels
from glm.kv_cache import SequenceCache
from glm.model import LayerStack
from glm.positions import prompt_layout
from glm.precision import Precision
from tests.tiny_checkpoints import FAMILIES, write_checkpoint

KERNELS = [kernels for name in INSTRUCTION_SETS if (kernels := load_kernels(name)) is not None]
PRECISIONS = (Precision.INT8, Precision.INT4, Precision.BF16)
PROMPTS = ([5, 6, 30, 91, 94], [30, 91, 94], [5, 6, 7, 8, 9, 10, 91, 94])
# Widths in whole groups of 32, several of them.
WIDTHS = {
    "chatglm": {"hidden_size": 64, "inner_hidden_size": 96},
    "chatglm2": {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 96},
    "glm": {"hidden_size": 64, "intermediate_size": 96},
    "glm4": {"hidden_size": 64, "intermediate_size": 96},
}

pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels were built here (no C++ compiler?)")


for_all_kernels = pytest.mark.usefixtures("_kernels")


@pytest.fixture(params=KERNELS, ids=lambda kernels: kernels.name)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found: NativeKernels = request.param
    monkeypatch.setattr(weights, "best_kernels", lambda: found)


def load(tmp_path: Path, family: str, precision: Precision) -> LayerStack:
    write_checkpoint(tmp_path, FAMILIES[family] | WIDTHS[family])
    config = load_config(tmp_path)
    return LayerStack.load(Checkpoint(tmp_path), config, 0, 2, precision, torch.device("cpu"))


def states(stack: LayerStack, num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, stack.config.hidden_size, generator=generator)


def prefilled(stack: LayerStack) -> list[Segment]:
    """A step of one token each behind three prompts."""
    segments = []
    for seed, prompt in enumerate(PROMPTS):
        cache, layout = stack.new_cache(), prompt_layout(prompt, stack.config)
        stack.forward(states(stack, len(prompt), seed), [Segment(cache, 0, len(prompt), layout)])
        segments.append(Segment(cache, len(prompt), 1, layout))
    return segments


def part_by_part(stack: LayerStack) -> None:
    for block in stack.blocks:
        assert isinstance(block, CausalBlock | PrefixBlock)
        block.native = None


def last_token(cache: SequenceCache) -> list[torch.Tensor]:
    return [part(layer)[-1] for layer in range(2) for part in (cache.key, cache.value)]


@for_all_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_one_call_or_in_parts(family: str, precision: Precision, tmp_path: Path) -> None:
    """The same hidden states, keys and values, of several sequences at once."""
    stack, found = load(tmp_path, family, precision), []
    assert all(block.native is not None for block in stack.blocks if isinstance(block, CausalBlock | PrefixBlock))
    for _ in range(2):
        segments = prefilled(stack)
        hidden = stack.forward(states(stack, len(segments), 9), segments)
        found.append([hidden, *[t for segment in segments for t in last_token(segment.cache)]])
        part_by_part(stack)
    bounds = {"rtol": 3e-2, "atol": 3e-2} if precision is Precision.BF16 else {"rtol": 1e-3, "atol": 1e-4}
    for at_once, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(at_once, in_parts, **bounds)


@for_all_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_company_or_alone(family: str, precision: Precision, tmp_path: Path) -> None:
    """Bit for bit the same."""
    stack = load(tmp_path, family, precision)
    together = prefilled(stack)
    hidden = states(stack, len(together), 9)
    found = stack.forward(hidden, together)
    for index, segment in enumerate(prefilled(stack)):
        assert torch.equal(stack.forward(hidden[index : index + 1], [segment]), found[index : index + 1])
        for one, other in zip(last_token(segment.cache), last_token(together[index].cache), strict=True):
            assert torch.equal(one, other)


def test_what_the_kernels_do_not_know_is_computed_in_parts(tmp_path: Path) -> None:
    """No native layer in fp32, nor where no kernels were built."""
    stack = load(tmp_path, "chatglm2", Precision.FP32)
    assert all(block.native is None for block in stack.blocks if isinstance(block, CausalBlock | PrefixBlock))
