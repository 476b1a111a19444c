"""Folders and weights of other programs: what they are is named, and what to do about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from glm import checkpoint
from glm.checkpoint import Checkpoint
from glm.config import load_config, parse_config
from glm.errors import CheckpointError, ConfigError, GlmError, ManifestError, MissingTensorError, ShardError
from glm.model_source import check_weights, made_for, open_checkpoint
from glm.weights_only import why_unsafe
from tests.tiny_checkpoints import CAUSAL, NATIVE, PREFIX, write_checkpoint

QKV = "transformer.encoder.layers.0.self_attention.query_key_value"


def complaint_about(names: list[str], tmp_path: Path) -> str:
    """What is said of a model in ChatGLM2's layout whose weights have these names."""
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    save_file({name: torch.zeros(2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(MissingTensorError) as caught:
        check_weights(Checkpoint(tmp_path), load_config(tmp_path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"{QKV}.qweight", f"{QKV}.qzeros", f"{QKV}.scales"], "quantised by 'GPTQ or AWQ'"),
        ([f"{QKV}.weight", f"{QKV}.SCB"], "quantised by 'bitsandbytes int8'"),
        ([f"{QKV}.weight", f"{QKV}.weight.absmax"], "quantised by 'bitsandbytes 4-bit'"),
        ([f"{QKV}.weight_packed"], "quantised by 'compressed-tensors'"),
        (["transformer.prefix_encoder.embedding.weight"], "P-Tuning prefix alone"),
        ([f"base_model.model.{QKV}.lora_A.default.weight"], "LoRA adapter: merge it"),
        (["base_model.model.transformer.embedding.word_embeddings.weight"], "'base_model.model.': merge it"),
        (["module.transformer.embedding.word_embeddings.weight"], "'module.': save the model itself"),
        (["x.y"], "the download is incomplete or config.json belongs to another model"),
    ],
)
def test_weights_under_other_names(names: list[str], said: str, tmp_path: Path) -> None:
    """The scheme, the adapter or the prefix of the names is told, not an incomplete download."""
    told = complaint_about(names, tmp_path)
    assert said in told
    assert ("incomplete" in told) == (names == ["x.y"])


@pytest.mark.parametrize("keys", [CAUSAL, PREFIX, NATIVE], ids=["chatglm2", "chatglm", "glm"])
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_config_that_names_its_scheme(keys: dict[str, Any], method: str) -> None:
    """In every layout: the scheme, and that the published model is to be quantised here instead."""
    with pytest.raises(ConfigError, match=f"quantised by '{method}'.*use the model as published.*glmpipe convert"):
        parse_config({**keys, "quantization_config": {"quant_method": method, "bits": 4}})


def test_a_prefix_cannot_be_merged() -> None:
    """Nobody is sent to look for a merged model that cannot be."""
    with pytest.raises(ConfigError, match=r"pre_seq_len is 128.*cannot be merged.*the model it was trained on"):
        parse_config({**CAUSAL, "pre_seq_len": 128})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_hidden_layers": 4, "num_layers": None}, "num_hidden_layers for num_layers"),
        ({"num_key_value_heads": 2, "multi_query_group_num": None}, "num_key_value_heads for multi_query_group_num"),
        ({"max_position_embeddings": 64, "seq_length": None}, "max_position_embeddings for seq_length"),
    ],
)
def test_the_layout_of_a_mixed_config_is_named(keys: dict[str, Any], said: str) -> None:
    """Each key that was written as in the other layout, and how it is called in this one."""
    with pytest.raises(ConfigError, match=rf"'chatglm' is the publisher's layout.*\({said}\).*model_type 'glm'"):
        parse_config({**CAUSAL, **keys})


def test_keys_of_both_layouts_side_by_side_do_no_harm() -> None:
    """Some tools write both."""
    both = {"num_hidden_layers": 4, "max_position_embeddings": 256}
    assert parse_config({**CAUSAL, **both}) == parse_config(CAUSAL)


@pytest.mark.parametrize(
    ("peft_type", "remedy"), [("LORA", "merge it into its base model"), ("PREFIX_TUNING", "cannot be merged")]
)
def test_an_adapters_folder_is_named(peft_type: str, remedy: str, tmp_path: Path) -> None:
    """Its kind and its base model."""
    settings = {"peft_type": peft_type, "base_model_name_or_path": "THUDM/chatglm3-6b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ConfigError, match=rf"{peft_type} adapter of \"THUDM/chatglm3-6b\"\), not a model: .*{remedy}"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    with pytest.raises(CheckpointError, match="holds an adapter"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [("m.Q4_0.gguf", "GGUF, which llama.cpp reads"), ("m.ggml", "GGML"), ("mp_rank_00_model_states.pt", "DeepSpeed")],
)
def test_weights_in_another_format_are_named(name: str, said: str, tmp_path: Path) -> None:
    """With or without a config.json beside them, and what to get instead."""
    (tmp_path / name).touch()
    for read in (load_config, Checkpoint):
        with pytest.raises(GlmError, match=rf"in another format \({name}: {said}.*safetensors or \.bin"):
            read(tmp_path)


def test_an_unfinished_conversion_is_no_model(tmp_path: Path) -> None:
    """At every stage of it: before config.json, before the manifest, and with everything but the mark gone."""
    (tmp_path / "unfinished-conversion").touch()
    with pytest.raises(ConfigError, match="a conversion that was not finished: run the same `glmpipe convert` again"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    with pytest.raises(ManifestError, match="was not finished"):
        open_checkpoint(tmp_path)
    write_checkpoint(tmp_path)
    for read in (open_checkpoint, made_for):
        with pytest.raises(ManifestError, match="was not finished"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("version", "holes"),
    [
        ("2.2.0", "CVE-2025-32434 and CVE-2026-24747"),
        ("2.5.1+cu121", "CVE-2025-32434 and CVE-2026-24747"),
        ("2.6.0", "(CVE-2026-24747)"),
        ("2.9.1+cpu", "(CVE-2026-24747)"),
        ("2.10.0", None),
        ("3.0.0a0+git", None),
        ("unknown", "CVE-2025-32434"),
    ],
)
def test_versions_of_torch_with_holes(version: str, holes: str | None) -> None:
    """Those before the release that mended the last one."""
    reason = why_unsafe(version)
    if holes is None:
        assert reason is None
    else:
        assert reason is not None
        assert holes in reason
        assert "install torch 2.10 or newer" in reason


def test_a_torch_with_holes_reads_no_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one file nor shards, nothing of them is unpickled; safetensors go on."""
    for name, num_shards in (("one", 1), ("many", 2)):
        write_checkpoint(tmp_path / name, suffix="bin", num_shards=num_shards)
    write_checkpoint(tmp_path / "safe")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for name in ("one", "many"):
        with pytest.raises(ShardError, match=r"\.bin is not read: .*CVE-2025-32434.*newer, or get the .* safetensors"):
            Checkpoint(tmp_path / name)
    with pytest.raises(ShardError, match="CVE-2025-32434"):
        checkpoint._mapped_bin(tmp_path / "one" / "pytorch_model.bin")
    assert QKV + ".weight" in Checkpoint(tmp_path / "safe")
