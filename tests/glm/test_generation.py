"""What each family generates with by default."""

import json
from pathlib import Path

import pytest

from glm.config import load_config
from glm.errors import ConfigError
from glm.generation import generation_defaults
from glm.sampling import SamplingParams
from glm.tokenizer import load_tokenizer
from tests.tiny_tokenizers import tiny_config, train_chatglm2


@pytest.mark.parametrize(
    ("published", "max_length", "temperature", "top_p", "end_ids", "guard_id"),
    [
        ("chatglm-6b", 2048, 0.95, 0.7, (130005,), 5),
        ("chatglm2-6b", 32768, 0.8, 0.8, (2,), 5),
        ("chatglm3-6b", 8192, 0.8, 0.8, (2, 64795, 64797), 5),
        ("glm-4-9b-chat", 131072, 0.8, 0.8, (151329, 151336, 151338), 198),
    ],
)
def test_published_defaults(
    published: str,
    max_length: int,
    temperature: float,
    top_p: float,
    end_ids: tuple[int, ...],
    guard_id: int,
    shared_dir: Path,
) -> None:
    """The table of published defaults, from the published configs, with and without a tokenizer."""
    directory = shared_dir / "golden" / "published" / published
    config = load_config(directory)
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / published, config)
    for defaults in (generation_defaults(config, directory), generation_defaults(config, directory, tokenizer)):
        assert defaults.max_length == max_length
        assert defaults.sampling == SamplingParams(temperature=temperature, top_p=top_p)
        assert defaults.end_ids == end_ids
        assert defaults.guard_id == guard_id


def test_a_small_model_stays_within_its_own_bounds(tmp_path: Path) -> None:
    """Neither the context nor the vocabulary of a small model is exceeded by what was published for large ones."""
    defaults = generation_defaults(tiny_config("chatglm2", name="chatglm3-tiny", vocab_size=704), tmp_path)
    assert (defaults.max_length, defaults.end_ids) == (512, (2,))
    assert generation_defaults(tiny_config("glm4", vocab_size=100), tmp_path).guard_id == 99


def test_end_ids_of_a_small_chatglm3_come_from_its_tokenizer(tmp_path: Path) -> None:
    """Role tokens follow the pieces, however many there are."""
    train_chatglm2(tmp_path)
    config = tiny_config("chatglm2")
    tokenizer = load_tokenizer(tmp_path, config, chat_format="chatglm3")
    expected = (2, tokenizer.special["<|user|>"], tokenizer.special["<|observation|>"])
    assert generation_defaults(config, tmp_path, tokenizer).end_ids == expected


def test_image_tokens_shift_the_guard(tmp_path: Path) -> None:
    """ChatGLM-6B's first revisions counted 20000 image tokens before the text's."""
    assert generation_defaults(tiny_config("chatglm", vocab_size=150528), tmp_path).guard_id == 20005


def test_generation_config_is_honoured(tmp_path: Path) -> None:
    """In transformers' layouts the file beside the weights decides."""
    config = tiny_config("glm4", eos_ids=(9,))
    assert generation_defaults(config, tmp_path).end_ids == (9,)
    assert generation_defaults(config, tmp_path).sampling == SamplingParams(temperature=0.8, top_p=0.8)
    given = {"eos_token_id": [3, 7, 3], "temperature": 0.6, "top_k": 5, "max_length": 100, "do_sample": False}
    (tmp_path / "generation_config.json").write_text(json.dumps({**given, "top_p": None}))
    defaults = generation_defaults(config, tmp_path)
    assert (defaults.end_ids, defaults.max_length) == ((3, 7), 100)
    assert defaults.sampling == SamplingParams(temperature=0.6, top_k=5, greedy=True)


@pytest.mark.parametrize(
    ("said", "sampling"),
    [
        ({}, SamplingParams(top_k=50, greedy=True)),
        ({"eos_token_id": 3}, SamplingParams(top_k=50, greedy=True)),
        ({"do_sample": None, "temperature": 0.6}, SamplingParams(temperature=0.6, top_k=50, greedy=True)),
        ({"do_sample": True}, SamplingParams(top_k=50)),
        ({"do_sample": True, "top_k": None, "top_p": None}, SamplingParams(top_k=50)),
        ({"do_sample": True, "top_k": 0, "temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"do_sample": True, "top_k": 7, "max_new_tokens": 9}, SamplingParams(top_k=7, max_new_tokens=9)),
    ],
)
def test_a_generation_config_means_what_transformers_makes_of_it(
    said: dict[str, object], sampling: SamplingParams, tmp_path: Path
) -> None:
    """Greedy where do_sample is not true, 50 tokens to choose among where nothing else is said, null as if absent."""
    (tmp_path / "generation_config.json").write_text(json.dumps({**said, "max_length": None}))
    defaults = generation_defaults(tiny_config("glm", eos_ids=(9,)), tmp_path)
    assert (defaults.sampling, defaults.max_length) == (sampling, 512)
    assert defaults.end_ids == ((3,) if "eos_token_id" in said else (9,))


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "glm", "glm4"])
def test_the_bound_of_an_answer_is_the_file_s_or_the_context(family: str, tmp_path: Path) -> None:
    """In every layout; a bound beyond the context is none."""
    config = tiny_config(family, max_context=32768)
    assert generation_defaults(config, tmp_path).max_length == 32768
    for said, bound in ((20_000, 20_000), (128_000, 32768), (None, 32768)):
        (tmp_path / "generation_config.json").write_text(json.dumps({"max_length": said}))
        assert generation_defaults(config, tmp_path).max_length == bound


@pytest.mark.parametrize(
    "content",
    [
        '{"do_sample": 1}',
        '{"max_length": true}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": 99999}',
        '{"temperature": -1}',
        '{"max_length": 0}',
        "[]",
        "{",
    ],
)
def test_an_impossible_generation_config_is_named(content: str, tmp_path: Path) -> None:
    """The error says which file, which key and what it must be."""
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        generation_defaults(tiny_config("glm"), tmp_path)
