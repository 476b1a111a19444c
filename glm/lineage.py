"""Which published model one in the layout of ChatGLM2 descends from: five models share it and differ in little.

What a file holds goes before what it calls the model, and that before the name of a folder. Code that the publisher
put beside the weights is read as text, never run.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from glm.errors import TokenizerError
from glm.json_file import read_json_object
from glm.small_file import is_file, read_beginning

if TYPE_CHECKING:
    from glm.config import ModelConfig

Ancestor = Literal["chatglm2", "chatglm3", "codegeex2", "glm4"]

ROLE_TOKEN = "<|user|>"
LARGE_VOCABULARY = 150_000
"""GLM-4 has 151552 ids, all models before it 65024."""
MANIFEST = "converted.json"
_MOST_CODE_BYTES = 4 << 20
_HINTS: tuple[tuple[str, Ancestor], ...] = (
    ("chatglm3", "chatglm3"),
    ("chatglm2", "chatglm2"),
    ("codegeex2", "codegeex2"),
    ("codegeex4", "glm4"),
    ("glm-4", "glm4"),
    ("glm4", "glm4"),
)
_SIZE = r"[-_ ]?(?:all[-_])?\d+[bm]"  # `chatglm3-6b` names a model, `ChatGLM3` mostly the checkout it was trained in
_EARLY_TRANSFORMERS = "4.27.1"  # ChatGLM3's code needs a later one


@dataclass(frozen=True, slots=True)
class Lineage:
    """The published model, and why it is taken for that; `is_certain` is false where nothing in the files decides."""

    ancestor: Ancestor
    reason: str
    is_certain: bool = True


@dataclass(frozen=True, slots=True)
class _Name:
    place: str
    text: str

    @property
    def last(self) -> str:
        return re.split(r"[/\\]", self.text.rstrip("/\\"))[-1]


def find_lineage(config: "ModelConfig", model_dir: Path | None) -> Lineage:
    """The ancestor of a model in ChatGLM2's layout. The evidence is, strongest first:

    0. what was found when a converted model was made, which its manifest has;
    1. the tokenizer's files: one in tiktoken's format, or a vocabulary of GLM-4's size, is GLM-4's; one that knows
       `<|user|>` is ChatGLM3's; so is the publisher's code where it does, or multiplies the rotary base;
    2. a model's name with its size, as `chatglm2-6b`, at the end of `name_or_path` in tokenizer_config.json, of
       `_name_or_path` in config.json, of the name in a converted model's manifest, or of a hub's repository;
    3. the keys of config.json, where one model alone was published with such;
    4. any other name there, and the folder's, that those keys do not contradict.

    What is left is a guess, which says so.

    Raises:
        TokenizerError: tokenizer_config.json, or another of the small JSON files, is unreadable.
    """
    settings = {} if model_dir is None else read_tokenizer_config(model_dir)
    source = {} if model_dir is None else read_json_object(model_dir / MANIFEST, TokenizerError).get("source", {})
    names = list(_names(config, model_dir, settings, source))
    possible = _possible(config, model_dir)
    steps: tuple[Callable[[], Lineage | None], ...] = (
        lambda: _as_converted(source),
        lambda: _by_tokenizer(config, model_dir),
        lambda: _by_code(model_dir),
        lambda: _by_model_name(names),
        lambda: _by_keys(config, possible),
        lambda: _by_other_name(names, model_dir, possible),
    )
    found = (step() for step in steps)
    return next((lineage for lineage in found if lineage is not None), None) or _guess(config, possible)


def _as_converted(source: Any) -> Lineage | None:
    found = source.get("lineage") if isinstance(source, dict) else None
    if not isinstance(found, dict) or found.get("ancestor") not in get_args(Ancestor):
        return None
    return Lineage(found["ancestor"], str(found.get("reason", "")), found.get("is_certain") is not False)


def _by_tokenizer(config: "ModelConfig", model_dir: Path | None) -> Lineage | None:
    if model_dir is not None and is_tiktoken_file(model_dir / "tokenizer.model"):
        return Lineage("glm4", "tokenizer.model is in tiktoken's format")
    if config.vocab_size >= LARGE_VOCABULARY:
        return Lineage("glm4", f"its vocabulary has {config.vocab_size} ids")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json"):
        if model_dir is not None and ROLE_TOKEN in _text(model_dir / name, 64 << 20):
            return Lineage("chatglm3", f"{name} knows {ROLE_TOKEN}")
    return None


def _by_code(model_dir: Path | None) -> Lineage | None:
    if model_dir is None:
        return None
    if ROLE_TOKEN in _text(model_dir / "tokenization_chatglm.py"):
        return Lineage("chatglm3", f"tokenization_chatglm.py knows {ROLE_TOKEN}")
    model_code = re.sub(r"\s+", "", _text(model_dir / "modeling_chatglm.py"))
    if "/self.rope_ratio" in model_code:
        return Lineage("chatglm2", "modeling_chatglm.py divides positions by rope_ratio")
    if "base*self.rope_ratio" in model_code:
        return Lineage("chatglm3", "modeling_chatglm.py multiplies the rotary base by rope_ratio")
    return None


def _by_model_name(names: list[_Name]) -> Lineage | None:
    for name in names:
        if ancestor := _hint(name.last, _SIZE):
            return Lineage(ancestor, f"{name.place} calls it {name.text!r:.200}")
    return None


def _by_keys(config: "ModelConfig", possible: frozenset[Ancestor]) -> Lineage | None:
    if len(possible) != 1:
        return None
    ratio = "" if config.rope_ratio is None else " beside rope_ratio"
    return Lineage(next(iter(possible)), f"no other was published with seq_length {config.max_context}{ratio}")


def _by_other_name(names: list[_Name], model_dir: Path | None, possible: frozenset[Ancestor]) -> Lineage | None:
    for name in names:
        whole = re.split(r"[/\\]", name.text)
        hints = [_hint(name.last, ""), *(_hint(part, _SIZE) for part in reversed(whole))]
        for ancestor in hints:
            if ancestor in possible:
                return Lineage(ancestor, f"{name.place} calls it {name.text!r:.200}")
    folder = "" if model_dir is None else directory_name(model_dir)
    ancestor = _hint(folder, "")
    if ancestor is None or ancestor not in possible:
        return None
    return Lineage(ancestor, f"its folder is called {folder!r:.200}", is_certain=False)


def _guess(config: "ModelConfig", possible: frozenset[Ancestor]) -> Lineage:
    """By what the published ones have in common, where no more is known."""
    if config.rope_ratio is not None:
        is_second = config.rope_ratio == 16 or "chatglm3" not in possible
        ancestor: Ancestor = "chatglm2" if is_second else "chatglm3"
        return Lineage(ancestor, f"its rope_ratio is {config.rope_ratio:g}", is_certain=False)
    if config.max_context == 8192:
        is_code = config.stored_dtype == "bfloat16" or "chatglm3" not in possible
        what = f"its seq_length is 8192 and its weights are {config.stored_dtype}"
        return Lineage("codegeex2" if is_code else "chatglm3", what, is_certain=False)
    return Lineage("chatglm2", f"its seq_length is {config.max_context}", is_certain=False)


def _possible(config: "ModelConfig", model_dir: Path | None) -> frozenset[Ancestor]:
    """What the keys of config.json, and code beside it, do not rule out.

    Published are ChatGLM2-6B with 32768 and no rope_ratio, ChatGLM3-6B and CodeGeeX2-6B with 8192 and none,
    and the longer ones of ChatGLM2 and ChatGLM3 with one.
    """
    if config.rope_ratio is not None:
        possible: frozenset[Ancestor] = frozenset({"chatglm2", "chatglm3", "glm4"})
    elif config.max_context == 8192:
        possible = frozenset({"chatglm3", "codegeex2"})
    elif config.max_context == 32768:
        possible = frozenset({"chatglm2"})
    else:
        possible = frozenset({"chatglm2", "chatglm3", "codegeex2", "glm4"})
    code = "" if model_dir is None else _text(model_dir / "tokenization_chatglm.py")
    is_early = config.saved_by == _EARLY_TRANSFORMERS
    if is_early or (code and ROLE_TOKEN not in code):
        possible -= {"chatglm3", "glm4"}
    return possible


def _names(config: "ModelConfig", model_dir: Path | None, settings: Mapping[str, Any], source: Any) -> Iterator[_Name]:
    repository = "" if model_dir is None else directory_name(model_dir)
    named = (
        _Name("tokenizer_config.json", str(settings.get("name_or_path") or "")),
        _Name("config.json", config.published_name),
        _Name(MANIFEST, str(source.get("name") or "") if isinstance(source, dict) else ""),
        _Name("the hub", repository if "/" in repository else ""),
    )
    return (name for name in named if name.text)


def _hint(text: str, size: str) -> Ancestor | None:
    return next((ancestor for hint, ancestor in _HINTS if re.search(hint + size, text.lower())), None)


def _text(path: Path, most_bytes: int = _MOST_CODE_BYTES) -> str:
    """The text of a file, empty where there is none to be had."""
    try:
        if not path.is_file() or path.stat().st_size > most_bytes:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def directory_name(model_dir: Path) -> str:
    """The directory's own name, or `org/name` inside a hub's cache (models--org--name/snapshots/COMMIT)."""
    model_dir = model_dir.resolve()
    if model_dir.parent.name != "snapshots":
        return model_dir.name
    return model_dir.parent.parent.name.removeprefix("models--").replace("--", "/")


def read_tokenizer_config(model_dir: Path) -> Mapping[str, Any]:
    """The keys of tokenizer_config.json; none when there is no such file.

    Raises:
        TokenizerError: the file is there but no JSON object.
    """
    return read_json_object(model_dir / "tokenizer_config.json", TokenizerError)


def is_tiktoken_file(path: Path) -> bool:
    """Whether a file begins as tiktoken's text format does: a base64 piece, a space, its rank, a newline."""
    if not is_file(path, TokenizerError):
        return False
    first = read_beginning(path, TokenizerError, 512).split(b"\n", 1)[0]
    piece, _, rank = first.rstrip(b"\r\n").partition(b" ")
    return bool(piece) and piece.isascii() and rank.isdigit() and not piece.startswith(b"version")
