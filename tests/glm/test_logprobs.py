"""Log-probabilities of tokens, against torch's own log_softmax."""

import math

import pytest
import torch

from glm.logprobs import TokenLogprob, perplexity, token_logprobs, total_logprob

VOCAB = 997


def scores(num_rows: int, scale: float = 8.0) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("num_rows", [0, 1, 16, 45])
@pytest.mark.parametrize("scale", [0.01, 8.0, 1e4])
def test_chosen_tokens_equal_log_softmax(num_rows: int, scale: float) -> None:
    """In double precision, however many rows there are and however steep the scores."""
    logits = scores(num_rows, scale)
    before = logits.clone()
    ids = [(37 * row) % VOCAB for row in range(num_rows)]
    expected = logits.double().log_softmax(-1)
    found = token_logprobs(logits, ids)
    assert [each.token_id for each in found] == ids
    assert [each.top for each in found] == [()] * num_rows
    for row, each in enumerate(found):
        assert each.logprob == pytest.approx(float(expected[row, ids[row]]), rel=1e-12, abs=1e-12)
    assert torch.equal(logits, before)


def test_the_most_likely_ones_come_best_first_and_equals_by_id() -> None:
    """They are those of a full sort; a vocabulary smaller than what is asked for gives all it has."""
    logits = scores(3)
    expected = logits.double().log_softmax(-1).sort(dim=-1, descending=True)
    for row, each in enumerate(token_logprobs(logits, [5, 6, 7], 4)):
        assert [token_id for token_id, _ in each.top] == expected.indices[row, :4].tolist()
        assert [logprob for _, logprob in each.top] == pytest.approx(expected.values[row, :4].tolist())
    [flat] = token_logprobs(torch.zeros(1, 3), [2], 20)
    assert flat.top == tuple((token_id, pytest.approx(-math.log(3))) for token_id in range(3))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_scores_give_no_nan_and_spoil_no_other_row(broken: float) -> None:
    """-inf and no alternatives; one token without a chance is no fault."""
    logits = scores(3)
    logits[1, 10] = broken
    logits[2, 10] = -math.inf
    first, bad, last = token_logprobs(logits, [10, 11, 10], 2)
    assert bad == TokenLogprob(11, -math.inf, ())
    assert math.isfinite(first.logprob) and len(first.top) == 2
    assert last.logprob == -math.inf and all(math.isfinite(logprob) for _, logprob in last.top)
    [none] = token_logprobs(torch.full((1, 4), -math.inf), [0], 2)
    assert none == TokenLogprob(0, -math.inf, ())


def test_ids_and_rows_must_match() -> None:
    """A caller's mistake is told, not broadcast."""
    with pytest.raises(ValueError, match="3 rows of scores for 2 tokens"):
        token_logprobs(scores(3), [1, 2])


def test_perplexity_is_that_of_the_mean() -> None:
    """Of a uniform choice it is the number of choices, without a chance infinite; without tokens there is none."""
    uniform = token_logprobs(torch.zeros(5, 64), [1, 2, 3, 4, 5])
    assert perplexity(uniform) == pytest.approx(64)
    assert total_logprob(uniform) == pytest.approx(-5 * math.log(64))
    assert perplexity([TokenLogprob(1, -1e6)]) == math.inf
    assert perplexity([TokenLogprob(1, -math.inf)]) == math.inf
    with pytest.raises(ValueError, match="no tokens"):
        perplexity([])
