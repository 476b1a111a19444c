"""The embedding and the head: what they refuse, share and hand on."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.checkpoint import Checkpoint, ModelSource
from glm.convert import convert
from glm.converted import ConvertedCheckpoint
from glm.ends import Embedding, Head, end_placement, has_own_lm_head
from glm.errors import GlmError
from glm.layout import embedding_source, lm_head_source, lm_head_unit
from glm.linear import make_linear
from glm.model_source import check_weights
from glm.precision import Precision
from glm.weights import build_weight, read_parts
from tests.tiny_checkpoints import CAUSAL, NATIVE, PREFIX, write_checkpoint

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
@pytest.mark.parametrize("token_id", [-1, 96, 10**12])
def test_ids_outside_the_vocabulary_are_refused(precision: Precision, token_id: int, tmp_path: Path) -> None:
    """Another model's ids: the id and the size are named, in every precision."""
    config = write_checkpoint(tmp_path, NATIVE)
    embedding = Embedding.load(Checkpoint(tmp_path), config, end_placement(precision, CPU, config))
    with pytest.raises(GlmError, match=f"token id {token_id} is outside the vocabulary of 96"):
        embedding.forward(torch.tensor([5, token_id, 7]))


@pytest.mark.parametrize("keys", [PREFIX, {**NATIVE, "tie_word_embeddings": True}])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT4])
def test_a_tied_head_shares_the_table(keys: dict[str, object], precision: Precision, tmp_path: Path) -> None:
    """Held in the same way it is the same memory; held differently it is read from the same weights."""
    config, checkpoint = write_checkpoint(tmp_path, keys), Checkpoint(tmp_path)
    placement, other = end_placement(precision, CPU, config), end_placement(Precision.BF16, CPU, config)
    embedding = Embedding.load(checkpoint, config, placement, placement)
    shared = Head.load(checkpoint, config, placement, placement, embedding)
    assert shared._lm_head.weight is embedding.table  # type: ignore[attr-defined]
    apart = Head.load(checkpoint, config, placement, other, embedding)
    assert apart.num_bytes == 2 * config.vocab_size * config.hidden_size


TIED = [PREFIX, {**NATIVE, "tie_word_embeddings": True}, {**CAUSAL, "tie_word_embeddings": True}]


@pytest.mark.parametrize("keys", TIED)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("precision", list(Precision))
def test_a_stored_head_that_is_another_is_used(
    keys: dict[str, object], suffix: str, precision: Precision, tmp_path: Path
) -> None:
    """In every precision, whatever config.json says of tying; so it is after a conversion."""
    config = write_checkpoint(tmp_path / "model", keys, suffix=suffix, has_own_lm_head=True)
    checkpoint: ModelSource = Checkpoint(tmp_path / "model")
    assert has_own_lm_head(checkpoint, config)
    stored = read_parts(checkpoint, lm_head_unit(config), config)["table"]
    for source in (checkpoint, _converted(tmp_path, precision)) if precision.is_quantized else (checkpoint,):
        place = end_placement(precision, CPU, config)
        embedding = Embedding.load(source, config, place, place)
        head = Head.load(source, config, place, place, embedding)
        normed = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(1)).to(place.dtype)
        wanted = make_linear(build_weight(stored, place), None, place.kernels)(normed).float()
        assert torch.equal(head.logits(normed), wanted)


def _converted(tmp_path: Path, precision: Precision) -> ModelSource:
    convert(tmp_path / "model", tmp_path / "converted", precision, precision)
    return ConvertedCheckpoint(tmp_path / "converted")


@pytest.mark.parametrize("keys", TIED)
@pytest.mark.parametrize("lm_head_precision", [None, Precision.INT8, Precision.INT4])
def test_a_converted_tied_head_is_known_to_be_the_embedding(
    keys: dict[str, object], lm_head_precision: Precision | None, tmp_path: Path
) -> None:
    """Quantised or as published, so that one table serves both where they are held alike."""
    config = write_checkpoint(tmp_path / "model", keys)
    assert not has_own_lm_head(Checkpoint(tmp_path / "model"), config)
    convert(tmp_path / "model", tmp_path / "converted", Precision.INT8, lm_head_precision)
    assert not has_own_lm_head(ConvertedCheckpoint(tmp_path / "converted"), config)


@pytest.mark.parametrize("keys", TIED)
@pytest.mark.parametrize("kept", ["embedding", "lm_head"])
def test_ends_that_were_saved_once_are_found_under_either_name(
    keys: dict[str, object], kept: str, tmp_path: Path
) -> None:
    """Safetensors hold a shared tensor once, under the name that the writer liked: the model is the same, and so is
    what it is converted to."""
    config = write_checkpoint(tmp_path / "model", keys)
    names = {"embedding": embedding_source(config).names[0], "lm_head": lm_head_source(config).names[0]}
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    table = tensors.pop(names["embedding"])
    tensors.pop(names["lm_head"], None)
    save_file({**tensors, names[kept]: table}, path)
    checkpoint = Checkpoint(tmp_path / "model")
    check_weights(checkpoint, config)
    assert not has_own_lm_head(checkpoint, config)
    for source in (checkpoint, _converted(tmp_path, Precision.INT8)):
        place = end_placement(Precision.FP32, CPU, config)
        embedding = Embedding.load(source, config, place)
        assert torch.equal(embedding.forward(torch.arange(config.vocab_size)), table.float())
    head = Head.load(checkpoint, config, place, place)
    assert torch.equal(head.logits(torch.eye(config.hidden_size)).T, table.float())


@pytest.mark.parametrize("keys", [PREFIX, {**NATIVE, "tie_word_embeddings": True}, NATIVE])
def test_a_table_that_is_not_shared_stays_as_stored(keys: dict[str, object], tmp_path: Path) -> None:
    """In half the memory of fp32, its rows the same to the last bit; a quantised head beside it is a copy."""
    config = write_checkpoint(tmp_path, {**keys, "torch_dtype": "float16"})
    checkpoint = Checkpoint(tmp_path)
    wide, narrow = (end_placement(precision, CPU, config) for precision in (Precision.FP32, Precision.INT8))
    _, stored = next(iter(checkpoint.read(embedding_source(config).shapes)))
    embedding, ids = Embedding.load(checkpoint, config, wide, narrow), torch.tensor([5, 0, 95])
    assert embedding.num_bytes == 2 * stored.numel()
    assert torch.equal(embedding.forward(ids), stored[ids].float())
    head = Head.load(checkpoint, config, wide, narrow, embedding)
    assert head.num_bytes < 2 * stored.numel()
    assert head.forward(torch.ones(1, config.hidden_size)).shape == (1, config.vocab_size)


def test_logits_are_fp32_on_the_cpu(tmp_path: Path) -> None:
    """Whatever the precision of norm and projection, and of the hidden states that come in."""
    config = write_checkpoint(tmp_path, NATIVE)
    coarse, exact = (end_placement(p, CPU, config) for p in (Precision.BF16, Precision.FP32))
    head = Head.load(Checkpoint(tmp_path), config, coarse, exact)
    logits = head.forward(torch.ones(3, config.hidden_size, dtype=torch.float16))
    assert (logits.dtype, logits.device, logits.shape) == (torch.float32, CPU, (3, config.vocab_size))
    assert head.final_norm(torch.ones(3, config.hidden_size)).dtype == torch.bfloat16
    assert head.logits(torch.ones(0, config.hidden_size)).shape == (0, config.vocab_size)
