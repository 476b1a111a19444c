"""What is wrong with a model's files is told before anything starts: the small ones first, then headers of weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator import chat_model
from coordinator.cli import main
from coordinator.model_text import read_model_text
from glm.config import load_config
from glm.demo import demo_model_dir
from glm.errors import ConfigError, MissingTensorError, NoTokenizerError, TensorShapeError, TokenizerError
from glm.model_source import check_weights, open_checkpoint
from tests.tiny_checkpoints import CAUSAL, FAMILIES, NATIVE, write_checkpoint
from tests.tiny_tokenizers import train_chatglm2, train_tokenizer_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1018370\n"
QKV = "transformer.encoder.layers.3.self_attention.query_key_value.weight"


@pytest.fixture
def pointer_dir(tmp_path: Path) -> Path:
    """A model as a clone without git-lfs leaves it, and no weights at all: nothing can have been loaded."""
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    (tmp_path / "tokenizer.model").write_bytes(POINTER)
    return tmp_path


@pytest.mark.parametrize(
    "words", ["chat", "generate --prompt x", "generate --raw --prompt x", "launch", "dump --prompt x --out FILE"]
)
def test_a_tokenizer_that_is_a_pointer_is_told_first(
    words: str, pointer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the weights, which are missing too, are looked for; token ids need no tokenizer and come to these."""
    arguments = words.replace("FILE", str(pointer_dir / "x.safetensors")).split()
    assert main([*arguments, "--model", str(pointer_dir)]) == 2
    assert f"{pointer_dir / 'tokenizer.model'} is a Git-LFS pointer of " in capsys.readouterr().err
    assert main(["generate", "--ids", "5", "--model", str(pointer_dir)]) == 2
    assert f"{pointer_dir} has no weights" in capsys.readouterr().err


def test_a_file_of_prompts_wants_what_its_lines_want(pointer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One question among token ids takes the tokenizer."""
    prompts, ids, question = pointer_dir / "prompts.jsonl", '{"token_ids": [5]}\n', '{"prompt": "x"}\n'
    command = ["generate", "--prompts", str(prompts), "--out", str(pointer_dir / "out"), "--model", str(pointer_dir)]
    for text, said in ((ids, "has no weights"), (ids + question + ids, "is a Git-LFS pointer")):
        prompts.write_text(text)
        assert main(command) == 2
        assert said in capsys.readouterr().err


def test_a_model_without_tokenizer_files_can_be_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Token ids can be asked with; the launch notes that nothing else can. A chat is refused."""
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    assert main(["launch", "--model", str(tmp_path)]) == 2
    assert "note: only token ids can be asked with: " in capsys.readouterr().err
    assert main(["chat", "--model", str(tmp_path)]) == 2
    assert f"glmpipe: {tmp_path} has no tokenizer.model or tokenizer.json, so text" in capsys.readouterr().err


def test_a_chat_format_that_cannot_be_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tokenizer may be whole and the template of its chats not: asked by --raw that does not matter."""
    (tmp_path / "config.json").write_text(json.dumps({**NATIVE, "vocab_size": 4096}))
    train_tokenizer_json(tmp_path, chat_template="{% for")
    assert main(["chat", "--model", str(tmp_path)]) == 2
    assert "the model's chat template is not valid Jinja" in capsys.readouterr().err
    assert main(["generate", "--raw", "--prompt", "x", "--model", str(tmp_path)]) == 2
    assert "has no weights" in capsys.readouterr().err


def test_the_chat_format_taken_is_said_and_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the reason, before anything loads; token ids have no use for it, but for how positions are understood."""
    keys = {**CAUSAL, "padded_vocab_size": 4096, "seq_length": 8192}
    (tmp_path / "config.json").write_text(json.dumps({**keys, "rope_ratio": 16}))
    train_chatglm2(tmp_path)
    for words, said in (
        (["chat"], "note: chat format chatglm2 is a guess, as its rope_ratio is 16"),
        (["chat", "--chat-format", "chatglm3"], "note: chat format chatglm3: as was asked for"),
        (["generate", "--ids", "5"], "note: positions are divided by 16, as in ChatGLM2"),
    ):
        assert main([*words, "--model", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert ("chat format" in err) is (words[0] == "chat")
        assert "has no weights" in err
    with pytest.raises(SystemExit):
        main(["chat", "--chat-format", "llama"])
    assert main(["chat", "--connect", "x", "--chat-format", "glm4"]) == 2
    assert "drop --chat-format" in capsys.readouterr().err


def test_impossible_generation_defaults_are_told_first(tmp_path: Path) -> None:
    """They are read with the tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(NATIVE))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4096}')
    with pytest.raises(ConfigError, match="eos_token_id is 4096"):
        chat_model.launch(tmp_path)


def test_what_a_model_text_holds(tmp_path: Path) -> None:
    """A missing tokenizer is an error when it is wanted, a broken one also when nothing was said about it."""
    config = load_config(demo_model_dir())
    whole = read_model_text(demo_model_dir(), config)
    whole.check("chat")
    assert whole.check_files() is None
    bare = read_model_text(tmp_path, config)
    bare.check("token ids")
    with pytest.raises(NoTokenizerError):
        bare.check("text")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(TokenizerError, match="is empty"):
        read_model_text(tmp_path, config).check_files()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_whole_models_pass(family: str, suffix: str, tmp_path: Path) -> None:
    """Every layout, published quantised ones too."""
    keys: dict[str, Any] = FAMILIES[family]
    config = write_checkpoint(tmp_path / "a", keys, suffix=suffix, num_shards=2)
    check_weights(open_checkpoint(tmp_path / "a"), config)
    if family.startswith("chatglm"):
        packed = write_checkpoint(tmp_path / "b", {**keys, "quantization_bit": 4}, suffix=suffix)
        check_weights(open_checkpoint(tmp_path / "b"), packed)


def test_missing_and_misshapen_tensors_are_told_before_a_worker_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last layer, which is loaded last."""
    config = write_checkpoint(tmp_path, num_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = tmp_path / weight_map[QKV]
    tensors = load_file(shard)
    save_file({**tensors, QKV: torch.zeros(64, 30)}, shard)
    monkeypatch.setattr(chat_model, "Cluster", lambda *_: pytest.fail("a worker was started"))
    with pytest.raises(TensorShapeError, match=rf"tensor {QKV} has shape \[64, 30\]"):
        chat_model.launch(tmp_path)
    tensors.pop(QKV)
    save_file(tensors, shard)
    with pytest.raises(MissingTensorError, match=f"the index says tensor {QKV} is here, but it is not"):
        chat_model.launch(tmp_path)
    index.write_text(json.dumps({"weight_map": {name: file for name, file in weight_map.items() if name != QKV}}))
    with pytest.raises(MissingTensorError, match=f"tensor {QKV} is in no shard"):
        check_weights(open_checkpoint(tmp_path), config)


def test_a_head_that_config_json_denies_is_used_and_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is that of the same files with a config.json that does not tie them."""
    tied = {**CAUSAL, "tie_word_embeddings": True}
    write_checkpoint(tmp_path, tied, has_own_lm_head=True)
    command = ["generate", "--ids", "5,17,40", "--greedy", "--max-new-tokens", "8", "--model", str(tmp_path)]
    assert main(command) == 0
    told = capsys.readouterr()
    assert f"note: {tmp_path} holds an lm_head that differs from its embedding, though config.json ties" in told.err
    (tmp_path / "config.json").write_text(json.dumps(CAUSAL))
    assert main(command) == 0
    plain = capsys.readouterr()
    assert (told.out, "lm_head that differs" in plain.err) == (plain.out, False)
