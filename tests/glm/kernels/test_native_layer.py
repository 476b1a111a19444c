"""A layer in one native call against the same layer part by part: every family, precision and instruction set."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from glm import weights
from glm.attention import Segment
from glm.block import CausalBlock, PrefixBlock
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.kernels.native import NativeKernels
from glm.kv_cache import SequenceCache
from glm.model import MOST_AT_ONCE, LayerStack
from glm.positions import prompt_layout
from glm.precision import Precision
from tests.native_kernels import KERNEL_PARAMETERS
from tests.tiny_checkpoints import FAMILIES, write_checkpoint

PRECISIONS = tuple(Precision)
PROMPTS = ([5, 6, 30, 91, 94], [30, 91, 94], [5, 6, 7, 8, 9, 10, 91, 94])
# Widths in whole groups of 32, several of them.
WIDTHS = {
    "chatglm": {"hidden_size": 64, "inner_hidden_size": 96},
    "chatglm2": {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 96},
    "glm": {"hidden_size": 64, "intermediate_size": 96},
    "glm4": {"hidden_size": 64, "intermediate_size": 96},
}

for_all_kernels = pytest.mark.usefixtures("_kernels")


@pytest.fixture(params=KERNEL_PARAMETERS)
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


def prefilled(stack: LayerStack, spans: tuple[int, ...] = (1, 1, 1)) -> list[Segment]:
    """A step of so many tokens each behind three prompts."""
    segments = []
    for seed, (prompt, num_tokens) in enumerate(zip(PROMPTS, spans, strict=True)):
        cache, layout = stack.new_cache(), prompt_layout(prompt, stack.config)
        stack.forward(states(stack, len(prompt), seed), [Segment(cache, 0, len(prompt), layout)])
        segments.append(Segment(cache, len(prompt), num_tokens, layout))
    return segments


@contextmanager
def part_by_part(stack: LayerStack) -> Iterator[None]:
    """No calls of whole layers until the block is left."""
    blocks = [block for block in stack.blocks if isinstance(block, CausalBlock | PrefixBlock)]
    natives, native = [block.native for block in blocks], stack.native
    assert all(natives)
    stack.native = None
    for block in blocks:
        block.native = None
    yield
    stack.native = native
    for block, native in zip(blocks, natives, strict=True):
        block.native = native


def last_tokens(cache: SequenceCache, num_tokens: int = 1) -> list[torch.Tensor]:
    return [part(layer)[-num_tokens:] for layer in range(2) for part in (cache.key, cache.value)]


@for_all_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spans", [(1, 1, 1), (3, 1, 4)])
def test_in_one_call_or_in_parts(spans: tuple[int, ...], family: str, precision: Precision, tmp_path: Path) -> None:
    """The same hidden states, keys and values, of several sequences at once, with one token each or with several, and
    of their prompts."""
    stack, found = load(tmp_path, family, precision), []
    for way in (nullcontext(), part_by_part(stack)):
        with way:
            segments = prefilled(stack, spans)
            hidden = stack.forward(states(stack, sum(spans), 9), segments)
        lengths = [s.start_pos + s.num_tokens for s in segments]
        found.append([hidden, *[t for s, n in zip(segments, lengths, strict=True) for t in last_tokens(s.cache, n)]])
    bounds = {Precision.FP16: {"rtol": 4e-3, "atol": 4e-3}, Precision.BF16: {"rtol": 3e-2, "atol": 3e-2}}
    for at_once, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(at_once, in_parts, **bounds.get(precision, {"rtol": 1e-3, "atol": 1e-4}))


@for_all_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_layers_at_once_or_one_by_one(family: str, precision: Precision, tmp_path: Path) -> None:
    """Bit for bit the same, in hidden states and caches; asked once, or before each layer, whether to go on."""
    stack, found, num_asked = load(tmp_path, family, precision), [], 0

    def count() -> None:
        nonlocal num_asked
        num_asked += 1

    for native in (stack.native, None):
        stack.native = native
        segments = prefilled(stack)
        num_asked = 0
        hidden = stack.forward(states(stack, 3, 9), segments, before_layer=count)
        assert num_asked == (2 if native is None else 1)
        found.append([hidden, *[t for s in segments for t in last_tokens(s.cache)]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@for_all_kernels
def test_what_looks_on_or_takes_long_goes_layer_by_layer(tmp_path: Path) -> None:
    """An observer sees every layer's output; many tokens can be given up between two layers."""
    stack, seen, asked = load(tmp_path, "chatglm2", Precision.INT4), [], []
    stack.forward(states(stack, 2, 1), [Segment(stack.new_cache(), 0, 2)], lambda layer, _: seen.append(layer))
    assert seen == [0, 1]
    many = MOST_AT_ONCE + 1
    cache = stack.new_cache()
    stack.forward(states(stack, many, 1), [Segment(cache, 0, many)], before_layer=lambda: asked.append(cache.length))
    assert asked == [0, 0]


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
        for one, other in zip(last_tokens(segment.cache), last_tokens(together[index].cache), strict=True):
            assert torch.equal(one, other)


@for_all_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_several_tokens_or_one_after_the_other(family: str, precision: Precision, tmp_path: Path) -> None:
    """Bit for bit the same: a step that verifies a draft computes what plain decoding would, beside other sequences
    too."""
    stack, spans = load(tmp_path, family, precision), (1, 5, 2)
    together = prefilled(stack, spans)
    hidden = states(stack, sum(spans), 9)
    found = stack.forward(hidden, together)
    for index, first in enumerate(prefilled(stack)):
        start = sum(spans[:index])
        for i in range(spans[index]):
            segment = Segment(first.cache, first.start_pos + i, 1, first.layout)
            token = slice(start + i, start + i + 1)
            assert torch.equal(stack.forward(hidden[token], [segment]), found[token])
        tokens = [last_tokens(s.cache, spans[index]) for s in (first, together[index])]
        assert all(torch.equal(one, other) for one, other in zip(*tokens, strict=True))


LONG = {"chatglm": [5, 6, 30, 91, 94], "chatglm2": [], "glm": [], "glm4": []}
STEPS = [[300], [1] * 10 + [290], [7] * 42 + [6], [8, 9, 63, 64, 65, 70, 21], [256, 44]]


@for_all_kernels
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_however_a_prompt_is_cut(family: str, precision: Precision, tmp_path: Path) -> None:
    """Bit for bit the same hidden states, keys and values: in one step, cut anywhere, beside another sequence or alone,
    with one thread or two. (Of a prefix LM behind the prompt, which cannot be cut; after a loss all is fed at once.)"""
    stack, start = load(tmp_path, family, precision), len(LONG[family])
    hidden = states(stack, start + 300, 9)
    layout = prompt_layout(LONG[family], stack.config) if start else None

    def through(cut: list[int], num_beside: int) -> list[torch.Tensor]:
        cache, beside, place, found = stack.new_cache(), stack.new_cache(), 0, []
        other = prompt_layout(LONG[family], stack.config) if start else None
        if num_beside:
            stack.forward(states(stack, 5, 3), [Segment(beside, 0, 5, other)])
        for size in [start + cut[0], *cut[1:]]:
            company = [Segment(beside, beside.length, num_beside, other)] * (num_beside > 0)
            step = torch.cat((states(stack, num_beside, 4), hidden[place : place + size]))
            found.append(stack.forward(step, [*company, Segment(cache, place, size, layout)])[num_beside:])
            place += size
        return [torch.cat(found), *last_tokens(cache, place)]

    wanted = through(STEPS[0], 0)
    for cut in STEPS:
        for num_beside, threads in ((0, 1), (3, 2)):
            torch.set_num_threads(threads)
            try:
                found = through(cut, num_beside)
            finally:
                torch.set_num_threads(1)
            assert all(map(torch.equal, found, wanted)), (cut, num_beside, threads)


@for_all_kernels
def test_layers_are_native_at_every_precision(tmp_path: Path) -> None:
    """No step leaves them, however long: torch, whose sums depend on their company, adds up nothing."""
    for precision in Precision:
        stack = load(tmp_path / precision, "chatglm2", precision)
        assert stack.native is not None
