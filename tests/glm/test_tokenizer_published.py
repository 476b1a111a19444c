"""The publisher's own tokenizer files give what the publisher's own code gives on them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from glm.config import load_config
from glm.decoding import IncrementalDecoder
from glm.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import SHARED

MODELS = ["chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"]
Cases = dict[str, Any]

pytestmark = pytest.mark.usefixtures("shared_dir")


@cache
def load(model: str) -> Tokenizer:
    return load_tokenizer(SHARED / "tokenizers" / model, load_config(SHARED / "golden" / "published" / model))


@cache
def cases_of(model: str) -> Cases:
    cases: Cases = json.loads((SHARED / "golden" / "tokenizer_cases.json").read_text(encoding="utf-8"))
    if "encode_is_the_same_as" in cases[model]:
        cases[model]["encode"] = cases[cases[model]["encode_is_the_same_as"]]["encode"]
    return cases[model]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_texts_become_the_published_ids_and_come_back(model: str) -> None:
    """Every text: ids with and without special ones, and the text those decode to."""
    tokenizer = load(model)
    for case in cases_of(model)["encode"]:
        assert tokenizer.encode_prompt(case["text"]) == case["ids"]
        assert tokenizer.encode(case["text"]) == case["ids_no_special"]
        assert tokenizer.encode_prompt(case["text"])[len(tokenizer.vocabulary.prefix_ids) :][
            : len(case["ids_no_special"])
        ] == case.get("bpe_ids", case["ids_no_special"])
        assert tokenizer.decode(case["ids_no_special"]) == case["decoded"]


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_pieces_are_the_published_ones(name: str) -> None:
    """What an id stands for is the piece that the published code shows, white space and bytes aside."""
    tokenizer = load(name)
    for case in cases_of(name)["encode"]:
        for token_id, shown in zip(case["ids_no_special"], case["pieces"], strict=True):
            if shown.startswith("<0x"):
                assert tokenizer.piece(token_id).data == bytes([int(shown[1:-1], 16)])
            elif not shown.startswith(("<|", "<n>")):
                assert tokenizer.piece(token_id).data.decode() == shown.replace("\u2581", " ")


def test_ids_become_the_published_text(model: str) -> None:
    """Every list of ids, with special tokens shown as published and with them left out."""
    tokenizer = load(model)
    for case in cases_of(model)["decode"]:
        assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]
        if "skip_special" in case:
            assert tokenizer.decode(case["ids"]) == case["skip_special"]


def test_special_ids_are_the_published_ones(model: str) -> None:
    """Names of special tokens lead to their published ids."""
    special = load(model).special
    names = {"mask": "[MASK]", "gmask": "[gMASK]", "smask": "[sMASK]", "sop_bos": "<sop>", "eop_eos": "<eop>"}
    names |= {"pad": "<pad>", "unk": "<unk>"}
    checked = 0
    for key, token_id in cases_of(model)["special"].items():
        name = names.get(key, key)
        if name in special:
            assert special[name] == token_id
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "chatglm3-6b"])
def test_typed_special_names_become_special_only_when_allowed(name: str) -> None:
    """As the published call does it when allowed, and never by default."""
    tokenizer = load(name)
    for case in cases_of(name)["special_token_text"]:
        allowed = name != "chatglm3-6b"  # its cases were made with the setting off, those below with it on
        assert tokenizer.encode_prompt(case["text"], allow_special=allowed) == case["ids"]
        assert not set(tokenizer.encode(case["text"])) & set(tokenizer.special.values())
    for case in cases_of(name).get("encode_special_tokens_true", []):
        assert tokenizer.encode_prompt(case["text"], allow_special=True) == case["ids"]


def test_typed_special_names_in_glm4() -> None:
    """A bare call makes them special, a chat message does not."""
    tokenizer = load("glm-4-9b-chat")
    for case in cases_of("glm-4-9b-chat")["special_token_text"]:
        assert tokenizer.encode(case["text"], allow_special=True) == case["ids_via_tokenizer_call"]
        assert tokenizer.encode(case["text"]) == case["ids_inside_a_chat_message"]


@pytest.mark.parametrize(("name", "end_id"), [("chatglm-6b", 130005), ("chatglm2-6b", 2)])
def test_a_second_text_follows_the_prompt(name: str, end_id: int) -> None:
    """A pair of texts is the prompt's ids, the plain ids of the second text, and the end id."""
    tokenizer = load(name)
    for case in cases_of(name)["pair"]:
        assert tokenizer.encode_prompt(case["text"]) + tokenizer.encode(case["pair"]) + [end_id] == case["ids"]


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b", "glm-4-9b-chat"])
def test_a_batch_is_padded_on_the_left(name: str) -> None:
    """Rows of a published batch are the prompts' ids after pad ids."""
    tokenizer, pad_id = load(name), load_config(SHARED / "golden" / "published" / name).pad_id
    for case in cases_of(name)["batch"]:
        for text, row in zip(case["texts"], case["input_ids"], strict=True):
            ids = tokenizer.encode_prompt(text)
            assert [pad_id] * (len(row) - len(ids)) + ids == row


@pytest.mark.parametrize("setting", ["do_lower_case", "remove_space"])
def test_settings_of_chatglm(setting: str, tmp_path: Path) -> None:
    """`do_lower_case` and `remove_space` in tokenizer_config.json do what the published code does."""
    (tmp_path / "ice_text.model").symlink_to(SHARED / "tokenizers" / "chatglm-6b" / "ice_text.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({setting: True, "num_image_tokens": 0}))
    tokenizer = load_tokenizer(tmp_path, load_config(SHARED / "golden" / "published" / "chatglm-6b"))
    for case in cases_of("chatglm-6b")[f"{setting}_true"]:
        assert tokenizer.encode_prompt(case["text"]) == case["ids"]


TYPED = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="你好，世界！ \n\t.?!,'snt mrve", max_size=40),
    st.lists(st.sampled_from(["👨‍👩‍👧‍👦", "👋🏽", "🇨🇳", "龘", "é", " n't", " '", "  "]), max_size=10).map("".join),
)


@settings(max_examples=60, deadline=None)
@given(text=TYPED, data=st.data())
def test_pushes_add_up_to_the_whole_text(text: str, data: st.DataObject) -> None:
    """One id at a time gives the text of all at once; finished text shows no replacement character."""
    name = data.draw(st.sampled_from(MODELS))
    tokenizer = load(name)
    ids = tokenizer.encode(text)
    decoder = IncrementalDecoder(tokenizer)
    parts = [decoder.push(token_id) for token_id in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)
    if "\ufffd" not in text and not any("\ud800" <= character <= "\udfff" for character in text):
        assert not any("\ufffd" in part for part in parts)
        if name != "chatglm-6b":  # which normalises texts
            assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_ids_decode_as_sentencepiece_decodes_them(data: st.DataObject) -> None:
    """Ordinary ids in any order: the library's own decoder is the oracle, ChatGLM-6B's clean-up aside."""
    name = data.draw(st.sampled_from(["chatglm-6b", "chatglm2-6b"]))
    tokenizer = load(name)
    num_pieces = {"chatglm-6b": 130344, "chatglm2-6b": 64789}[name]
    bytes_from = {"chatglm-6b": 130088, "chatglm2-6b": 3}[name]
    one_id = st.one_of(st.integers(5, num_pieces - 1), st.integers(bytes_from, bytes_from + 255))
    ids = [i for i in data.draw(st.lists(one_id, max_size=20)) if not tokenizer.piece(i).is_special]
    file = "ice_text.model" if name == "chatglm-6b" else "tokenizer.model"
    expected = library(SHARED / "tokenizers" / name / file).decode(ids)
    if name == "chatglm-6b":
        for length in range(80, 1, -1):
            expected = expected.replace(f"<|blank_{length}|>", " " * length)
        expected = expected.replace("<|tab|>", "\t").replace("<n>", "\n")
        for old, new in tokenizer.rules.replacements:
            expected = expected.replace(old, new)
    assert tokenizer.decode(ids) == expected


@cache
def library(path: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(path))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 151551), max_size=30), st.booleans())
def test_random_ids_of_glm4(ids: list[int], skip_special: bool) -> None:
    """Any ids, those of a padded vocabulary included: the bytes of all ordinary ids, decoded once."""
    tokenizer = load("glm-4-9b-chat")
    decoder = IncrementalDecoder(tokenizer, skip_special=skip_special)
    text = "".join(decoder.push(token_id) for token_id in ids) + decoder.flush()
    assert text == tokenizer.decode(ids, skip_special=skip_special)
    if skip_special:
        pieces = [tokenizer.piece(token_id) for token_id in ids]
        data = b"".join(piece.data for piece in pieces if not piece.is_special)
        assert text == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("tail", ["", "x", "\n1"])
@pytest.mark.parametrize("blank", [" ", "\u00a0", "\u3000"])
def test_a_million_blanks_are_taken(blank: str, tail: str) -> None:
    """More than the library behind GLM-4's tokenizer bears in one piece; nothing of them is lost."""
    tokenizer = load("glm-4-9b-chat")
    text = "\u4f60" + 999_999 * blank + tail
    assert b"".join(tokenizer.piece(token_id).data for token_id in tokenizer.encode(text)) == text.encode()
