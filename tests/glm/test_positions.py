"""Positions, masks and rotary angles follow from a few integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glm.config import parse_config
from glm.errors import ConfigError
from glm.positions import PromptLayout, prompt_layout, token_position, token_positions, visible_keys
from glm.rotary import Rotary, inverse_frequencies, rotate_halves, rotate_neighbours
from tests.tiny_checkpoints import CAUSAL, NATIVE, PREFIX

BOS, MASK, GMASK = PREFIX["bos_token_id"], PREFIX["mask_token_id"], PREFIX["gmask_token_id"]
LAYOUTS = st.none() | st.builds(PromptLayout, st.integers(1, 12), st.none() | st.integers(0, 11))


def test_causal_families_have_no_layout() -> None:
    """Whatever the ids, special ones of another family included."""
    assert prompt_layout([5, GMASK, BOS], parse_config(CAUSAL)) is None
    assert prompt_layout([], parse_config(NATIVE)) is None


@pytest.mark.parametrize(
    ("ids", "two_dimensional", "wanted"),
    [
        ([5, 6, GMASK, BOS], True, PromptLayout(3, 2)),
        ([5, MASK, 6, BOS], True, PromptLayout(3, 1)),
        ([5, MASK, 6, GMASK, BOS], True, PromptLayout(4, 1)),
        ([GMASK, 5, MASK, BOS], True, PromptLayout(3, 2)),
        ([5, GMASK, BOS, 7, GMASK, BOS], True, PromptLayout(2, 1)),
        ([5, 6, GMASK, BOS], False, PromptLayout(3, None)),
        ([5, MASK, 6, BOS], False, PromptLayout(3, 1)),
    ],
)
def test_the_layout_of_a_prefix_prompt(ids: list[int], two_dimensional: bool, wanted: PromptLayout) -> None:
    """The first bos ends the context; [MASK] goes before [gMASK]; one-dimensional [gMASK] positions count on."""
    assert prompt_layout(ids, parse_config({**PREFIX, "position_encoding_2d": two_dimensional})) == wanted


@pytest.mark.parametrize("ids", [[], [5, 6], [5, GMASK], [5, BOS]])
def test_a_prefix_prompt_needs_its_marks(ids: list[int]) -> None:
    """Raw ids without mask or bos: the error names the ids to append."""
    with pytest.raises(ConfigError, match=rf"mask token \({MASK} or {GMASK}\) .* {BOS}; append both to the {len(ids)}"):
        prompt_layout(ids, parse_config(PREFIX))


@given(LAYOUTS, st.integers(0, 20), st.integers(1, 20))
def test_positions_of_pieces_are_those_of_the_whole(layout: PromptLayout | None, start_pos: int, num: int) -> None:
    """A token's positions depend on its index alone, not on the piece it comes in."""
    whole = token_positions(0, start_pos + num, layout)
    assert torch.equal(token_positions(start_pos, num, layout), whole[:, start_pos:])


@given(LAYOUTS, st.integers(1, 20))
def test_who_sees_whom(layout: PromptLayout | None, num: int) -> None:
    """Key j is visible to query i when j <= i or j lies in the context; None stands for all of them."""
    visible = visible_keys(0, num, layout)
    context = layout.context_length if layout else 0
    wanted = [[j <= i or j < context for j in range(num)] for i in range(num)]
    assert (torch.ones(num, num, dtype=torch.bool) if visible is None else visible).tolist() == wanted


def test_prefix_frequencies_are_rounded_to_fp16() -> None:
    """ChatGLM-6B's only; the others' are exact."""
    prefix, causal = inverse_frequencies(parse_config(PREFIX)), inverse_frequencies(parse_config(NATIVE))
    assert torch.equal(prefix, prefix.half().float())
    assert not torch.equal(causal, causal.half().float())


@pytest.mark.parametrize("keys", [PREFIX, PREFIX | {"position_encoding_2d": False}, CAUSAL, NATIVE])
@pytest.mark.parametrize("layout", [None, PromptLayout(4, 2), PromptLayout(4, None)])
def test_rows_looked_up_are_rows_computed(keys: dict[str, object], layout: PromptLayout | None) -> None:
    """Bit for bit, of one token, of several in a row, of several here and there, near and far."""
    rotary = Rotary(parse_config(keys), torch.device("cpu"))
    for places in ([0], [5], [2047], [2048], [3, 4, 5], [9000, 1, 9000, 4100], list(range(16))):
        computed = torch.cat([token_positions(at, 1, layout) for at in places], dim=1)
        wanted = rotary.table(computed)
        found = rotary.rows([token_position(at, layout) for at in places])
        assert found.cos.shape == wanted.cos.shape
        assert torch.equal(found.cos, wanted.cos)
        assert torch.equal(found.sin, wanted.sin)


@pytest.mark.parametrize("keys", [PREFIX, CAUSAL, NATIVE])
def test_rotation_keeps_lengths_and_depends_on_distance(keys: dict[str, object]) -> None:
    """What makes it a rotary embedding: norms stay, scores depend on how far apart the tokens are."""
    config = parse_config(keys)
    rotate = rotate_halves if config.is_prefix_lm else rotate_neighbours
    x = torch.randn(1, 1, config.head_dim, generator=torch.Generator().manual_seed(0)).expand(6, 1, -1)
    table = Rotary(config, torch.device("cpu")).table(torch.arange(6).expand(2, 6))
    rotated = rotate(x, table)[:, 0]
    torch.testing.assert_close(rotated.norm(dim=-1), x[:, 0].norm(dim=-1))
    scores = rotated @ rotated.t()
    torch.testing.assert_close(scores.diagonal(2), scores[0, 2].expand(4))
    assert torch.equal(rotated[0], x[0, 0])
