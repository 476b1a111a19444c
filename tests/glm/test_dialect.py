"""Which published way of talking a model has, decided from what lies in its directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm.config import load_config
from glm.convert import convert
from glm.dialect import detect_dialect, find_dialect
from glm.errors import TokenizerError
from glm.precision import Precision
from tests.tiny_checkpoints import CAUSAL, write_checkpoint
from tests.tiny_tokenizers import tiny_config, train_chatglm2, write_glm4

LONG = {"seq_length": 32768}
SHORT = {"seq_length": 8192}


def dialect_of(model_dir: Path, keys: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> tuple[str, bool]:
    """What a directory with such a config.json and tokenizer_config.json is taken for, and whether that is certain."""
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps({**CAUSAL, **keys}))
    if tokenizer is not None:
        (model_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    found = find_dialect(load_config(model_dir), model_dir)
    return found.dialect, found.is_certain


@pytest.mark.parametrize(
    ("keys", "dialect", "is_certain"),
    [
        ({"_name_or_path": "THUDM/chatglm2-6b", **LONG}, "chatglm2", True),
        ({"_name_or_path": "THUDM/chatglm3-6b", **SHORT}, "chatglm3", True),
        ({"_name_or_path": "THUDM/chatglm3-6b-32k", **LONG, "rope_ratio": 50}, "chatglm3", True),
        ({"_name_or_path": "THUDM/chatglm2-6b-32k", **LONG, "rope_ratio": 16}, "chatglm2", True),
        ({"_name_or_path": "THUDM/codegeex2-6b", **SHORT}, "codegeex2", True),
        ({"_name_or_path": "THUDM/codegeex4-all-9b"}, "glm4", True),
        ({"_name_or_path": "THUDM/glm4-9b-chat"}, "glm4", True),
        ({"padded_vocab_size": 151552}, "glm4", True),
        (LONG, "chatglm2", True),
        ({**SHORT, "torch_dtype": "float16"}, "chatglm3", False),
        ({**SHORT, "torch_dtype": "bfloat16"}, "codegeex2", False),
        ({**SHORT, "transformers_version": "4.27.1"}, "codegeex2", True),
        ({**LONG, "rope_ratio": 50}, "chatglm3", False),
        ({**LONG, "rope_ratio": 16}, "chatglm2", False),
        ({**LONG, "rope_ratio": 50, "transformers_version": "4.27.1"}, "chatglm2", True),
    ],
)
def test_what_config_json_tells(keys: dict[str, Any], dialect: str, is_certain: bool, tmp_path: Path) -> None:
    """A model's name with its size decides; without one, keys that one published model alone has; the rest guesses."""
    assert dialect_of(tmp_path / "model", keys) == (dialect, is_certain)


@pytest.mark.parametrize(
    ("keys", "tokenizer", "folder", "dialect"),
    [
        # A ChatGLM2 that was trained in the checkout of ChatGLM3, or loaded from there.
        ({"_name_or_path": "/data/ChatGLM3/output/checkpoint-3000", **LONG}, {}, "model", "chatglm2"),
        ({"_name_or_path": "/data/ChatGLM3/chatglm2-6b", **LONG}, {}, "model", "chatglm2"),
        ({"_name_or_path": "ChatGLM3", **LONG}, {}, "model", "chatglm2"),
        ({"_name_or_path": "C:\\ChatGLM3\\out"}, {"name_or_path": "THUDM/chatglm2-6b"}, "model", "chatglm2"),
        # Nameless ones.
        ({**LONG, "rope_ratio": 50}, {"name_or_path": "THUDM/chatglm3-6b-32k"}, "my-model", "chatglm3"),
        ({**LONG, "rope_ratio": 50}, {"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}, "x", "chatglm3"),
        ({**SHORT, "_name_or_path": "out"}, {"name_or_path": "THUDM/codegeex2-6b"}, "my-model", "codegeex2"),
        # A folder's name is worth less than the files, and something where these leave a choice.
        (LONG, {}, "chatglm3-6b-32k", "chatglm2"),
        ({"_name_or_path": "THUDM/chatglm3-6b", **SHORT}, {}, "chatglm2-6b", "chatglm3"),
        (SHORT, {}, "my-codegeex2", "codegeex2"),
        (SHORT, {}, "was-chatglm2", "chatglm3"),
    ],
)
def test_files_come_before_names_of_folders(
    keys: dict[str, Any], tokenizer: dict[str, Any], folder: str, dialect: str, tmp_path: Path
) -> None:
    """The tokenizer's files and their name, then the keys of config.json, then what a checkout or folder is called."""
    assert dialect_of(tmp_path / folder, keys, tokenizer)[0] == dialect


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "tokenizer.json"])
def test_any_file_of_the_tokenizer_may_know_the_roles(name: str, tmp_path: Path) -> None:
    """A fine-tune saved by transformers lists its special tokens in one or another."""
    (tmp_path / name).write_text('{"additional_special_tokens": ["<|user|>"]}')
    assert dialect_of(tmp_path, {**LONG, "_name_or_path": "out"}) == ("chatglm3", True)


@pytest.mark.parametrize(
    ("file", "code", "dialect"),
    [
        ("tokenization_chatglm.py", 'role_special_tokens = ["<|system|>", "<|user|>"]', "chatglm3"),
        ("tokenization_chatglm.py", 'special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]', "chatglm2"),
        ("modeling_chatglm.py", "seq_idx = torch.arange(seq_len) / self.rope_ratio", "chatglm2"),
        ("modeling_chatglm.py", "base = base * self.rope_ratio", "chatglm3"),
    ],
)
def test_the_publisher_s_code_is_read_as_text(file: str, code: str, dialect: str, tmp_path: Path) -> None:
    """It lies beside the weights in a clone, and says which model it is for; it is not run."""
    (tmp_path / file).write_text(f"raise SystemExit\n{code}\n")
    assert dialect_of(tmp_path, {**LONG, "rope_ratio": 40})[0] == dialect


@pytest.mark.parametrize("folder", ["model", "chatglm2-6b-converted"])
def test_a_converted_model_remembers(folder: str, tmp_path: Path) -> None:
    """What was found when it was made holds in a folder of any name, though code and folder are left behind."""
    source = tmp_path / "codegeex2-6b"
    write_checkpoint(source, {**CAUSAL, **SHORT})
    assert detect_dialect(load_config(source), source) == "codegeex2"
    convert(source, tmp_path / folder, Precision.INT8, None)
    found = find_dialect(load_config(tmp_path / folder), tmp_path / folder)
    assert (found.dialect, found.is_certain) == ("codegeex2", False)


def test_a_manifest_without_that_tells_by_its_name(tmp_path: Path) -> None:
    """Models converted before had the name alone."""
    (tmp_path / "converted.json").write_text('{"source": {"name": "codegeex2-6b"}}')
    assert dialect_of(tmp_path, SHORT) == ("codegeex2", True)


def test_other_layouts_have_one_dialect(tmp_path: Path) -> None:
    """ChatGLM-6B's config is its own; transformers' layouts bring a template."""
    assert detect_dialect(tiny_config("chatglm"), tmp_path) == "chatglm"
    assert detect_dialect(tiny_config("glm"), tmp_path) == "template"
    assert detect_dialect(tiny_config("glm4"), tmp_path) == "template"


def test_tokenizer_files_come_before_names(tmp_path: Path) -> None:
    """The content of tokenizer.model, then role tokens in tokenizer_config.json, outweigh a name."""
    config = tiny_config("chatglm2", name="THUDM/chatglm2-6b", max_context=32768)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "<|user|>"}))
    assert detect_dialect(config, tmp_path) == "chatglm3"
    write_glm4(tmp_path)
    assert detect_dialect(config, tmp_path) == "glm4"
    train_chatglm2(tmp_path)
    assert detect_dialect(config, tmp_path) == "chatglm3"


def test_the_directory_of_a_hub_snapshot_has_its_repository_s_name(tmp_path: Path) -> None:
    """In the hub's cache the directory is named by a commit; the repository's name stands two above."""
    snapshot = tmp_path / "models--THUDM--chatglm3-6b" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert dialect_of(snapshot, LONG) == ("chatglm3", True)


def test_what_was_taken_is_said_with_its_reason(tmp_path: Path) -> None:
    """A guess says so, and what to do about it."""
    (tmp_path / "config.json").write_text(json.dumps({**CAUSAL, **SHORT}))
    guess = find_dialect(load_config(tmp_path), tmp_path).note
    assert guess.startswith("chat format chatglm3 is a guess, as its seq_length is 8192")
    assert "--chat-format (chatglm2, codegeex2, glm4)" in guess
    (tmp_path / "tokenizer_config.json").write_text('{"name_or_path": "THUDM/codegeex2-6b"}')
    certain = find_dialect(load_config(tmp_path), tmp_path).note
    assert certain == "chat format codegeex2: tokenizer_config.json calls it 'THUDM/codegeex2-6b'"


def test_the_caller_has_the_last_word(tmp_path: Path) -> None:
    """An override is taken as it is, an unknown one refused with what is known."""
    config = tiny_config("chatglm2", name="THUDM/chatglm3-6b")
    assert detect_dialect(config, tmp_path, "chatglm2") == "chatglm2"
    with pytest.raises(TokenizerError, match=r"'llama'.*chatglm, chatglm2, chatglm3"):
        detect_dialect(config, tmp_path, "llama")


def test_an_unreadable_tokenizer_config_is_named(tmp_path: Path) -> None:
    """Damage is reported, not guessed around."""
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        detect_dialect(tiny_config("chatglm2"), tmp_path)


@pytest.mark.parametrize(
    ("published", "dialect"),
    [
        ("chatglm-6b", "chatglm"),
        ("chatglm2-6b", "chatglm2"),
        ("chatglm2-6b-int4", "chatglm2"),
        ("chatglm3-6b", "chatglm3"),
        ("glm-4-9b-chat", "glm4"),
    ],
)
def test_published_configs(published: str, dialect: str, shared_dir: Path) -> None:
    """Every published config leads to its model's dialect, also without tokenizer files."""
    directory = shared_dir / "golden" / "published" / published
    found = find_dialect(load_config(directory), directory)
    assert (found.dialect, found.is_certain) == (dialect, True)


@pytest.mark.parametrize("published", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_published_tokenizers(published: str, shared_dir: Path) -> None:
    """The publisher's tokenizer alone tells, whatever config.json calls itself."""
    dialect = {"chatglm2-6b": "chatglm2", "chatglm3-6b": "chatglm3", "glm-4-9b-chat": "glm4"}[published]
    config = tiny_config("chatglm2", name="/data/ChatGLM3/output", max_context=4096)
    assert detect_dialect(config, shared_dir / "tokenizers" / published) == dialect
