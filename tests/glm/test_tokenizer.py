"""Tokenizers of every kind, on small ones trained on the spot: loading, special tokens, broken files."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm.byte_level_tokenizer import BLANK_RUN, TiktokenTokenizer
from glm.config import ModelConfig
from glm.errors import TokenizerError
from glm.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import (
    SPECIAL,
    tiny_config,
    train_chatglm,
    train_chatglm2,
    train_tokenizer_json,
    write_glm4,
)

GLM4_RANKS = 278
KINDS = ["chatglm", "chatglm2", "chatglm3", "glm4", "template"]


def config_of(kind: str) -> ModelConfig:
    if kind == "chatglm":
        return tiny_config("chatglm", bos_id=8, vocab_size=600)
    if kind == "glm4":
        return tiny_config("chatglm2", eos_ids=(GLM4_RANKS, GLM4_RANKS + 7, GLM4_RANKS + 9))
    if kind == "template":
        return tiny_config("glm4", vocab_size=600)
    return tiny_config("chatglm2", max_context=8192 if kind == "chatglm3" else 32768)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory of every kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    writers = (train_chatglm, train_chatglm2, train_chatglm2, write_glm4, train_tokenizer_json)
    made = {}
    for kind, write in zip(KINDS, writers, strict=True):
        made[kind] = root / kind
        made[kind].mkdir()
        write(made[kind])
    return made


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(directories[request.param], config_of(request.param))


def test_the_kind_is_found(directories: dict[str, Path]) -> None:
    """Each directory is recognised as what it is, by content where names and configs agree."""
    for kind in KINDS:
        assert load_tokenizer(directories[kind], config_of(kind)).dialect == kind


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    """Newlines, tabs, blanks, Chinese and characters no vocabulary has survive."""
    text = "你好 hello\n\n  x\ty 👋🏽 龘"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == text


def test_an_empty_text_is_no_ids(tokenizer: Tokenizer) -> None:
    """Only what surrounds a prompt remains of an empty one."""
    assert tokenizer.encode("") == []
    assert len(tokenizer.encode_prompt("")) == 2


def test_typed_special_names_stay_text(tokenizer: Tokenizer) -> None:
    """Nothing that somebody types becomes a special id or gets lost."""
    text = " ".join([*SPECIAL, *tokenizer.special, "</s>", "<s>", "<unk>"])
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text


def test_half_a_surrogate_pair_is_encoded_as_unknown(tokenizer: Tokenizer) -> None:
    """Input that is no Unicode text does not fail; whole pairs are put together."""
    assert tokenizer.encode("a\ud83d") == tokenizer.encode("a\ufffd")
    assert tokenizer.encode("\ud83d\udc4b") == tokenizer.encode("👋")


def test_unknown_ids_decode_to_nothing(tokenizer: Tokenizer) -> None:
    """A padded vocabulary has ids that no tokenizer knows."""
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([tokenizer.vocab_size, *ids, 10**6]) == "ab"


def test_image_tokens_shift_all_ids(tmp_path: Path) -> None:
    """The first revisions of ChatGLM-6B count 20000 image tokens before the text's, said or seen from the config."""
    train_chatglm(tmp_path, num_image_tokens=0)
    plain = load_tokenizer(tmp_path, tiny_config("chatglm", bos_id=8))
    ids = plain.encode_prompt("你好\n")
    for settings, bos_id in (({"num_image_tokens": 20000}, None), ({}, 20008)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        shifted = load_tokenizer(tmp_path, tiny_config("chatglm", bos_id=bos_id, vocab_size=30000))
        assert shifted.encode_prompt("你好\n") == [token_id + 20000 for token_id in ids]
        assert shifted.decode(shifted.encode_prompt("你好\n")) == "你好\n"
        assert shifted.decode([5, 19999, -1]) == ""


def test_image_tokens_of_another_revision_are_told_with_the_right_number(tmp_path: Path) -> None:
    """A tokenizer_config.json of the first revision beside later weights: the number to write, not another model."""
    train_chatglm(tmp_path, num_image_tokens=20000)
    with pytest.raises(TokenizerError, match=r"num_image_tokens is 20000, .* 4096 ids .* which fit 0: write 0 there"):
        load_tokenizer(tmp_path, tiny_config("chatglm", bos_id=8))


def test_glm4_special_ids_come_from_the_config(tmp_path: Path) -> None:
    """Where tokenizer_config.json places special tokens, that holds; a mismatch with the ranks is damage."""
    first = write_glm4(tmp_path)
    names = ["[gMASK]", "<sop>", "<|user|>"]
    added = {str(first + index): {"content": name} for index, name in enumerate(names)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path, tiny_config("chatglm2"))
    assert tokenizer.special == {name: first + index for index, name in enumerate(names)}
    write_glm4(tmp_path, num_extra=3)
    with pytest.raises(TokenizerError, match="259 ranks"):
        load_tokenizer(tmp_path, tiny_config("chatglm2"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A directory without tokenizer files says what is missing and that ids still work."""
    with pytest.raises(TokenizerError, match=r"ice_text\.model.*token ids"):
        load_tokenizer(tmp_path, tiny_config("chatglm"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path, tiny_config("glm4"))


@pytest.mark.parametrize("kind", KINDS)
def test_broken_files_are_refused(kind: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """Truncated files, pointers and empty files give one clear error."""
    [source] = [path for path in directories[kind].iterdir() if "config" not in path.name]
    data = source.read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    for content, message in (
        (data[: len(data) // 2 - 1], "download it again"),
        (data[:-1] if kind == "template" else data[:-9], "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"", "is empty"),
    ):
        (tmp_path / source.name).write_bytes(content)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path, config_of(kind))


def test_a_tokenizer_of_another_model_is_refused(directories: dict[str, Path]) -> None:
    """A tokenizer with more ids than the model's vocabulary cannot be the model's."""
    with pytest.raises(TokenizerError, match="another model"):
        load_tokenizer(directories["chatglm2"], tiny_config("chatglm2", vocab_size=300))


def test_a_decoder_that_is_not_byte_level_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    """A tokenizer.json that decodes in another way is refused instead of shown wrongly."""
    content = json.loads((directories["template"] / "tokenizer.json").read_text())
    content["decoder"] = {"type": "Fuse"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="ByteLevel"):
        load_tokenizer(tmp_path, config_of("template"))


BLANKS = st.sampled_from([" ", "\t", "\n", "\r", "\u00a0", "\u3000", "\x85", "\x1c", "\u180e", "\u200b", "\u2028"])
PIECES = st.one_of(
    BLANKS, BLANKS.map(lambda blank: 5 * blank), st.sampled_from(["a", "你", "'s", ".", "!?", "12", "\0"])
)


@given(text=st.lists(PIECES, max_size=12).map("".join), longest=st.integers(2, 6))
def test_long_blanks_apart_change_no_id(text: str, longest: int, directories: dict[str, Path]) -> None:
    """Wherever white space is taken out of the library's hands, the ids are those it gives for the whole text."""
    tokenizer = load_tokenizer(directories["glm4"], config_of("glm4"))
    assert isinstance(tokenizer, TiktokenTokenizer)
    tokenizer._long_blank = re.compile(BLANK_RUN % longest)
    assert tokenizer.encode(text) == tokenizer._encoding.encode_ordinary(text)


def test_long_blanks_are_looked_for_once_a_run() -> None:
    """Not again from each of a run's characters, which takes minutes, the interpreter's lock held, of a long text."""
    found = re.compile(BLANK_RUN % 3)
    assert [run.span() for run in found.finditer(" \u3000\t\n\u00a0    x   ")] == [(0, 3), (4, 9), (10, 13)]
    assert found.match("      ", 1) is None


class _PanicException(BaseException):
    """As what libraries written in Rust raise when they give up: no Exception."""


@pytest.mark.parametrize("fault", [_PanicException("gave up"), MemoryError(), RecursionError("deep"), IndexError()])
def test_a_librarys_fault_over_a_text_is_one_typed_error(
    fault: BaseException, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever class it is; only what ends programs passes."""

    def fail(_: str) -> list[int]:
        raise fault

    monkeypatch.setattr(tokenizer, "_encode_text", fail)
    with pytest.raises(TokenizerError, match=f"this text of 2 characters: {str(fault) or type(fault).__name__}"):
        tokenizer.encode_prompt("ab")
    fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("ab")
