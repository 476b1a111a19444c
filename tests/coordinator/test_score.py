"""Scoring a text: which tokens count where, and that a pipeline says what the undivided model says."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coordinator.chat_model import ChatModel
from coordinator.cli import main
from coordinator.planning import plan_for
from coordinator.score import score_tokens, summarise, token_fields, windows
from glm.checkpoint import Checkpoint
from glm.logprobs import TokenLogprob
from glm.model import LayerStack, Model, Segment
from glm.positions import prompt_layout
from glm.precision import Precision
from tests.in_process import CPU, in_process_engine
from tests.tiny_checkpoints import CAUSAL, FAMILIES, PREFIX, write_checkpoint
from tests.tiny_tokenizers import train_chatglm2


@given(
    num_tokens=st.integers(0, 200), size=st.integers(2, 40), stride=st.integers(1, 40), first_scored=st.integers(0, 1)
)
def test_every_token_counts_once_with_enough_before_it(
    num_tokens: int, size: int, stride: int, first_scored: int
) -> None:
    """In order; no window is larger than asked for, none is empty, and all but the first window's tokens have
    `size - stride` tokens before them at least."""
    stride = min(stride, size)
    cuts = list(windows(num_tokens, size, stride, first_scored))
    counted = [position for cut in cuts for position in range(cut.first_scored, cut.end)]
    assert counted == list(range(first_scored, num_tokens))
    for number, cut in enumerate(cuts):
        assert 0 < cut.end - cut.start <= size
        assert cut.start == number * stride
        assert cut.first_scored < cut.end
        if number:
            assert cut.first_scored - cut.start >= size - stride


class Counter:
    """Finds the token at index i of what it is given likely as -i."""

    def __init__(self) -> None:
        self.fed: list[tuple[int, ...]] = []

    def score(self, token_ids: Any, *, num_prompt: int | None = None) -> list[TokenLogprob]:
        self.fed.append(tuple(token_ids))
        return [TokenLogprob(token_id, -float(i)) for i, token_id in enumerate(token_ids) if i >= (num_prompt or 1)]


@pytest.mark.parametrize("prefix", [(), (90, 91)])
def test_windows_begin_with_the_prefix_and_count_what_is_new(prefix: tuple[int, ...]) -> None:
    """A token's context is all that was fed before it; without a prefix the first token is left out."""
    scorer = Counter()
    scored = [each for window in score_tokens(scorer, prefix, range(10), 6, 3) for each in window]
    assert scorer.fed == [(*prefix, *range(start, min(start + 6, 10))) for start in (0, 3, 6)]
    assert [each.position for each in scored] == list(range(0 if prefix else 1, 10))
    assert [each.logprob.token_id for each in scored] == [each.position for each in scored]
    assert [each.num_context for each in scored] == [-each.logprob.logprob for each in scored]
    assert [each.num_context - len(prefix) for each in scored[-4:]] == [3, 4, 5, 3]


def test_figures_of_a_text() -> None:
    """Two tokens of one bit each for a text of four bytes in two characters."""
    score = summarise("éé", 3, 1, [TokenLogprob(1, -math.log(2))] * 2)
    assert (score.tokens, score.scored_tokens, score.windows, score.bytes, score.characters) == (3, 2, 1, 4, 2)
    assert score.logprob == pytest.approx(-2 * math.log(2))
    assert score.perplexity == pytest.approx(2)
    assert (score.bits_per_token, score.bits_per_byte, score.bits_per_character) == pytest.approx((1, 0.5, 1))


def test_the_line_of_a_token() -> None:
    """Chinese as it is, bytes of a half character replaced, minus infinity as null."""
    tokenizer: Any = SimpleNamespace(piece=lambda token_id: SimpleNamespace(data=["你".encode(), b"\xe4"][token_id]))
    [[first], [second]] = score_tokens(Counter(), (5,), (0, 1), 1, 1)
    assert '"你"' in token_fields(first, tokenizer)
    impossible = type(second)(1, TokenLogprob(1, -math.inf), 7)
    assert json.loads(token_fields(impossible, tokenizer)) == {
        "position": 1,
        "token_id": 1,
        "text": "\ufffd",
        "logprob": None,
        "context_tokens": 7,
    }


def undivided(model: Model, token_ids: list[int], num_prompt: int) -> list[float]:
    """Log-probabilities of all tokens but the first in one pass of the whole model."""
    layout = prompt_layout(token_ids[:num_prompt], model.config)
    hidden = model.embedding.forward(torch.tensor(token_ids))
    hidden = model.layers.forward(hidden, [Segment(model.layers.new_cache(), 0, len(token_ids), layout)])
    logprobs = model.head.forward(hidden).double().log_softmax(-1)
    return [float(logprobs[i, token_id]) for i, token_id in enumerate(token_ids[1:])]


def chat_model_over(model_dir: Path, ranges: list[tuple[int, int]]) -> ChatModel:
    """Stages of this process; no tokenizer."""
    engine, _, config = in_process_engine(model_dir, ranges)
    cluster: Any = SimpleNamespace(plan=plan_for(None, config.num_layers, ["cpu"]), kv_budgets=(1000,))
    return ChatModel(cluster, engine, config, model_dir, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_say_what_the_undivided_model_says(family: str, tmp_path: Path) -> None:
    """For every family and over windows; a prefix LM's text follows an empty prompt."""
    config = write_checkpoint(tmp_path, FAMILIES[family])
    chat_model = chat_model_over(tmp_path, [(0, 1), (1, config.num_layers)])
    layers = LayerStack.load(Checkpoint(tmp_path), config, 0, config.num_layers, Precision.FP32, CPU)
    model = Model(chat_model.engine.embedding, layers, chat_model.engine.head)
    prefix = (PREFIX["gmask_token_id"], PREFIX["bos_token_id"]) if config.is_prefix_lm else (7,)
    choice = random.Random(3)
    text = [choice.randrange(10, 80) for _ in range(150)]
    whole = undivided(model, [*prefix, *text], len(prefix))[len(prefix) - 1 :]
    [scored] = score_tokens(chat_model, prefix, text, 200, 100)
    assert [each.logprob.logprob for each in scored] == pytest.approx(whole, abs=1e-4)
    assert [each.logprob.token_id for each in scored] == text
    pieces = [each for window in score_tokens(chat_model, prefix, text, 64, 24) for each in window]
    for each in pieces:
        start = each.position + len(prefix) - each.num_context
        expected = undivided(model, [*prefix, *text[start : each.position + 1]], len(prefix))[-1]
        assert each.logprob.logprob == pytest.approx(expected, abs=1e-4)
    assert len(pieces) == 150
    assert chat_model.engine.is_idle


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "{}/absent"], "absent cannot be read: No such file"),
        (["--text", "{}/empty"], "empty is empty"),
        (["--text", "{}/latin"], "latin is not UTF-8 text (byte 1)"),
        (["--text", "{}/text", "--window", "256"], "--window 256 must be from 2 to 255"),
        (["--text", "{}/text", "--window", "10", "--stride", "11"], "--stride 11 must be from 1 to the window of 10"),
        (["--text", "{}/text", "--tokens", "{}"], "is a directory"),
        (
            ["--text", "{}/text", "--window", "255"],
            "--window 255: beside the model's prefix the plan's",
        ),
        (["--text", "{}/text", "--window", "20", "--max-model-len", "16"], "--window 20: beside the model's prefix"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_loading(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 2; the model has no weights at all."""
    (tmp_path / "config.json").write_text(json.dumps({**CAUSAL, "padded_vocab_size": 1024}))
    train_chatglm2(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes(b"a\xe9")
    (tmp_path / "text").write_text("a text")
    words = [word.format(tmp_path) for word in arguments]
    assert main(["score", "--model", str(tmp_path), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
