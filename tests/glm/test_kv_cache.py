"""A sequence's cache grows, is cut, is forked, and survives a forward that fails half-way."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.errors import CacheGapError, SegmentError
from glm.kv_cache import SequenceCache
from glm.model import LayerStack
from glm.positions import PromptLayout
from glm.precision import Precision
from tests.tiny_checkpoints import CAUSAL, PREFIX, write_checkpoint

HIDDEN_SIZE = 32
TOKENS = torch.randn(300, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> LayerStack:
    return load_stack(tmp_path_factory.mktemp("causal"), CAUSAL)


@pytest.fixture(scope="module")
def prefix_stack(tmp_path_factory: pytest.TempPathFactory) -> LayerStack:
    return load_stack(tmp_path_factory.mktemp("prefix"), PREFIX)


def load_stack(model_dir: Path, keys: dict[str, object]) -> LayerStack:
    config = write_checkpoint(model_dir, keys)
    return LayerStack.load(Checkpoint(model_dir), config, 0, 3, Precision.FP32, torch.device("cpu"))


def feed(stack: LayerStack, cache: SequenceCache, tokens: torch.Tensor) -> torch.Tensor:
    return stack.forward(tokens, [Segment(cache, cache.length, len(tokens))])


def contents(cache: SequenceCache) -> Iterator[torch.Tensor]:
    for layer in range(3):
        yield cache.key(layer).clone()
        yield cache.value(layer).clone()


def same(cache: SequenceCache, wanted: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, contents(cache), wanted))


def test_growth_keeps_what_is_there(stack: LayerStack) -> None:
    """Token by token over several growths: capacity stays ahead in ever larger pieces, contents stay the same."""
    cache, first, capacities = stack.new_cache(), None, set()
    assert (cache.length, cache.capacity, cache.num_bytes) == (0, 0, 0)
    for token in TOKENS:
        feed(stack, cache, token.unsqueeze(0))
        capacities.add(cache.capacity)
        first = first if first is not None else list(contents(cache))
    assert cache.length == len(TOKENS) <= cache.capacity
    assert len(capacities) <= 3
    assert cache.num_bytes == cache.capacity * stack.kv_bytes_per_token
    assert all(torch.equal(now[:1], then) for now, then in zip(contents(cache), first or [], strict=True))
    assert cache.key(0).shape == cache.value(2).shape == (len(TOKENS), CAUSAL["multi_query_group_num"], 8)


def test_reserve_never_shrinks(stack: LayerStack) -> None:
    """Room once made stays; asking for less changes nothing."""
    cache = stack.new_cache()
    cache.reserve(500)
    capacity = cache.capacity
    cache.reserve(10)
    assert cache.capacity == capacity >= 500
    assert cache.length == 0


def test_truncate_then_append_equals_never_having_had_more(stack: LayerStack) -> None:
    """Tokens behind the cut leave no trace."""
    cut, straight = stack.new_cache(), stack.new_cache()
    feed(stack, cut, TOKENS[:20])
    cut.truncate(8)
    assert cut.length == 8
    feed(stack, straight, TOKENS[:8])
    torch.testing.assert_close(feed(stack, cut, TOKENS[100:105]), feed(stack, straight, TOKENS[100:105]))
    for found, wanted in zip(contents(cut), contents(straight), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("length", [-1, 6, 100])
def test_truncate_and_fork_need_the_tokens(stack: LayerStack, length: int) -> None:
    """Neither invents tokens: both numbers are named, nothing changes."""
    cache = stack.new_cache()
    feed(stack, cache, TOKENS[:5])
    with pytest.raises(CacheGapError, match=f"cannot truncate to {length} tokens: 5 are cached"):
        cache.truncate(length)
    with pytest.raises(CacheGapError, match=f"cannot fork at {length} tokens: 5 are cached"):
        cache.fork(length)
    assert cache.length == 5


def test_a_fork_is_independent(stack: LayerStack) -> None:
    """Both go on differently from a common beginning, each as if it were alone; forks of nothing work too."""
    source = stack.new_cache()
    feed(stack, source, TOKENS[:10])
    before = list(contents(source))
    fork, empty = source.fork(6), source.fork(0)
    assert (fork.length, empty.length) == (6, 0)
    assert all(torch.equal(part, whole[:6]) for part, whole in zip(contents(fork), before, strict=True))
    forked = feed(stack, fork, TOKENS[50:55])
    assert same(source, before)
    alone = stack.new_cache()
    feed(stack, alone, TOKENS[:6])
    torch.testing.assert_close(feed(stack, alone, TOKENS[50:55]), forked)
    kept = list(contents(fork))
    feed(stack, source, TOKENS[60:70])
    source.truncate(0)
    feed(stack, source, TOKENS[70:75])
    assert same(fork, kept)
    assert feed(stack, empty, TOKENS[:3]).shape == (3, HIDDEN_SIZE)


@pytest.mark.parametrize("failing_layer", [0, 1, 2])
def test_a_forward_that_fails_changes_no_cache(stack: LayerStack, failing_layer: int) -> None:
    """After any layer: all sequences of the forward hold what they held, and the same forward then succeeds."""
    long, new = stack.new_cache(), stack.new_cache()
    feed(stack, long, TOKENS[:125])
    before = list(contents(long))
    tokens, segments = TOKENS[125:140], [Segment(long, 125, 10), Segment(new, 0, 5)]

    def fail(layer: int, _output: torch.Tensor) -> None:
        if layer == failing_layer:
            raise MemoryError("as a device would")

    with pytest.raises(MemoryError):
        stack.forward(tokens, segments, fail)
    assert (long.length, new.length) == (125, 0)
    assert same(long, before)
    again = stack.forward(tokens, segments)
    assert (long.length, new.length) == (135, 5)
    untroubled = stack.new_cache()
    feed(stack, untroubled, TOKENS[:125])
    torch.testing.assert_close(feed(stack, untroubled, TOKENS[125:135]), again[:10])


def test_a_segment_starts_where_its_cache_ends(stack: LayerStack) -> None:
    """Neither before nor behind: both positions are named."""
    cache = stack.new_cache()
    feed(stack, cache, TOKENS[:5])
    for start_pos in (0, 4, 6):
        with pytest.raises(CacheGapError, match=f"starts at position {start_pos}, its cache holds 5 tokens"):
            stack.forward(TOKENS[:2], [Segment(cache, start_pos, 2)])
    assert cache.length == 5


def test_segments_fit_each_other_and_the_hidden_states(stack: LayerStack) -> None:
    """One segment a cache, none empty, as many tokens as hidden states, of the right width."""
    cache, other = stack.new_cache(), stack.new_cache()
    with pytest.raises(SegmentError, match="two segments of one forward share a cache"):
        stack.forward(TOKENS[:4], [Segment(cache, 0, 2), Segment(cache, 0, 2)])
    with pytest.raises(SegmentError, match="a segment has 0 tokens"):
        stack.forward(TOKENS[:2], [Segment(cache, 0, 2), Segment(other, 0, 0)])
    with pytest.raises(SegmentError, match=r"of shape \[4, 32\] do not fit segments of 3 tokens in all"):
        stack.forward(TOKENS[:4], [Segment(cache, 0, 2), Segment(other, 0, 1)])
    with pytest.raises(SegmentError, match=r"of shape \[4, 31\] do not fit .* a hidden size of 32"):
        stack.forward(TOKENS[:4, :31], [Segment(cache, 0, 4)])
    assert (cache.length, other.length) == (0, 0)


def test_no_segments_give_no_hidden_states(stack: LayerStack) -> None:
    """A step of updates only carries an empty tensor."""
    assert stack.forward(TOKENS[:0], []).shape == (0, HIDDEN_SIZE)


def test_a_prefix_is_not_cut(prefix_stack: LayerStack) -> None:
    """Tokens that see each other both ways come in one segment; behind them any cut is fine."""
    cache, layout = prefix_stack.new_cache(), PromptLayout(context_length=6, mask_position=5)
    with pytest.raises(SegmentError, match=r"the first 6 tokens of this prompt .* not cut to \[0, 5\)"):
        prefix_stack.forward(TOKENS[:5], [Segment(cache, 0, 5, layout)])
    whole = prefix_stack.forward(TOKENS[:9], [Segment(cache, 0, 9, layout)])
    cache.truncate(3)
    with pytest.raises(SegmentError, match=r"not cut to \[3, 9\)"):
        prefix_stack.forward(TOKENS[3:9], [Segment(cache, 3, 6, layout)])
    pieces = prefix_stack.new_cache()
    parts = [
        prefix_stack.forward(part, [Segment(pieces, pieces.length, len(part), layout)])
        for part in TOKENS[:9].split([6, 1, 2])
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
