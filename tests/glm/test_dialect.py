"""Which published way of talking a model has, decided from what lies in its directory."""

import json
from pathlib import Path

import pytest

from glm.config import load_config
from glm.dialect import detect_dialect
from glm.errors import TokenizerError
from tests.tiny_tokenizers import tiny_config, train_chatglm2, write_glm4


@pytest.mark.parametrize(
    ("facts", "dialect"),
    [
        ({"name": "THUDM/chatglm2-6b", "max_context": 32768}, "chatglm2"),
        ({"name": "THUDM/chatglm3-6b", "max_context": 8192}, "chatglm3"),
        ({"name": "THUDM/chatglm3-6b-32k", "max_context": 32768}, "chatglm3"),
        ({"name": "THUDM/codegeex2-6b", "max_context": 8192}, "codegeex2"),
        ({"name": "THUDM/glm4-9b-chat", "vocab_size": 151552}, "glm4"),
        ({"name": "my-model", "max_context": 8192}, "chatglm3"),
        ({"name": "my-model", "max_context": 32768}, "chatglm2"),
        ({"name": "my-model", "vocab_size": 151552}, "glm4"),
    ],
)
def test_names_come_before_numbers(facts: dict[str, object], dialect: str, tmp_path: Path) -> None:
    """A published name decides; without one the numbers do."""
    assert detect_dialect(tiny_config("chatglm2", **facts), tmp_path) == dialect


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
    config = tiny_config("chatglm2", name="0123abcd", max_context=32768)
    assert detect_dialect(config, snapshot) == "chatglm3"


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
    assert detect_dialect(load_config(directory), directory) == dialect
