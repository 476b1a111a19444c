"""A tokenizer.json that means harm: it costs seconds and some memory, and one error names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from glm import tokenizer, tokenizer_json
from glm.errors import TokenizerError
from glm.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_tokenizers import tiny_config, train_tokenizer_json

TEXTS = ("Hello, 世界!\n\t  12", "it's  a <|user|>\r\n\r\n x", "")
TOO_MANY_WAYS = {"type": "Split", "pattern": {"Regex": r"^(a|a|b)*$"}, "behavior": "Isolated", "invert": False}
FOREVER = {**TOO_MANY_WAYS, "pattern": {"Regex": "a*a*a*c"}}
LETTERS = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\P{L}"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def then_bytes(step: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


def spoiled(directory: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A good tokenizer.json with a change."""
    train_tokenizer_json(directory)
    path = directory / "tokenizer.json"
    keys = json.loads(path.read_text(encoding="utf-8"))
    change(keys)
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def load(directory: Path) -> Tokenizer:
    return load_tokenizer(directory, tiny_config("glm"))


def confined(found: Tokenizer) -> bool:
    return found._own_rules is not None  # type: ignore[attr-defined]


def test_known_rules_run_here_and_unknown_ones_apart(tmp_path: Path) -> None:
    """Both give what the library gives; what GLM-4 and byte-level models have needs no process."""
    for number, (rules, is_apart) in enumerate(
        (
            (BYTES, False),
            (then_bytes({**LETTERS, "pattern": {"Regex": tokenizer_json.SPLIT_PATTERN}}), False),
            (then_bytes(LETTERS), True),
            (then_bytes({"type": "Metaspace", "replacement": "x", "prepend_scheme": "never", "split": True}), True),
            ({"type": "Sequence", "pretokenizers": [BYTES] * 9}, True),
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = spoiled(directory, lambda keys, rules=rules: keys.update(pre_tokenizer=rules))  # type: ignore[misc]
        found, library = load(directory), tokenizers.Tokenizer.from_file(str(path))
        library.encode_special_tokens = True
        assert confined(found) is is_apart, rules
        for text in TEXTS:
            assert found.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert found.vocabulary.prefix_ids == tuple(library.encode("", add_special_tokens=True).ids)


def test_rules_that_take_for_ever_are_stopped(tmp_path: Path) -> None:
    """A pattern that begins anew at each letter: one error, and the next text is cut as if nothing had been."""
    spoiled(tmp_path, lambda keys: keys.update(pre_tokenizer=then_bytes(FOREVER)))
    found = load(tmp_path)
    before = found.encode("aaa")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: its rules .* more time or memory than any should"):
        found.encode(("a" * 390 + " c ") * 20)
    assert found.encode("aaa") == before


def test_a_panic_over_one_text_fails_that_text(tmp_path: Path) -> None:
    """The library gives up after so many tries, with what is no ordinary exception: it must not end a launch."""
    spoiled(tmp_path, lambda keys: keys.update(pre_tokenizer=then_bytes(TOO_MANY_WAYS)))
    found = load(tmp_path)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot cut this text into words \(PanicException"):
        found.encode("a" * 60 + "c")
    assert found.encode("aaa")


def test_rules_that_take_all_memory_are_stopped(tmp_path: Path) -> None:
    """A letter becomes a thousand, three times over."""
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1500}
    spoiled(tmp_path, lambda keys: keys.update(normalizer={"type": "Sequence", "normalizers": [grow] * 3}))
    found = load(tmp_path)
    with pytest.raises(TokenizerError, match="more time or memory than any should"):
        found.encode("a")
    assert found.encode("bc")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda keys: keys["model"].update(vocab={str(n): n for n in range(70_000)}), "70006 pieces|70000 pieces"),
        (lambda keys: keys.update(added_tokens=[keys["added_tokens"][0]] * 5000), "5000 added tokens, at most"),
        (lambda keys: keys.update(model=None), "no model"),
        (lambda keys: keys.update(extra=[[]] * 3_000_000), "objects and arrays, far more"),
        (lambda keys: keys["post_processor"].update(special_tokens={}), "no complete tokenizer.json"),
        (lambda keys: keys["post_processor"].update(single=[{"Sequence": {"id": "B", "type_id": 0}}]), "no complete|"),
    ],
    ids=["pieces", "added", "no model", "arrays", "a name nobody gave", "a text nobody gave"],
)
def test_impossible_sizes_and_parts_are_one_error(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    """Also where the library would end with a panic, which is no ordinary exception."""
    spoiled(tmp_path, change)
    with pytest.raises(TokenizerError, match=words):
        load(tmp_path)


def test_a_nest_without_end_is_one_error(tmp_path: Path) -> None:
    """However deep."""
    for depth in (200, 5000, 200_000):
        (tmp_path / "tokenizer.json").write_text('{"model": {}, "x": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            load(tmp_path)


def test_a_file_far_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any kind of tokenizer; its size is enough."""
    train_tokenizer_json(tmp_path)
    monkeypatch.setattr(tokenizer, "MOST_TOKENIZER_BYTES", 1000)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json has \d+ bytes, far more"):
        load(tmp_path)


def test_texts_are_neither_padded_nor_cut(tmp_path: Path) -> None:
    """Padding to a thousand million tokens would take gigabytes, a truncation would lose what was asked."""
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "x"}
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    train_tokenizer_json(tmp_path)
    plain = load(tmp_path).encode_prompt("Hello, world")
    spoiled(tmp_path, lambda keys: keys.update(padding=padding, truncation=truncation))
    assert load(tmp_path).encode_prompt("Hello, world") == plain
