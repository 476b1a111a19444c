"""Model directories small enough to be written and read some thousand times a minute."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from glm.convert import convert
from glm.precision import Precision
from tests.tiny_checkpoints import CAUSAL, NATIVE, PREFIX, write_checkpoint
from tests.tiny_tokenizers import ROLES, train_chatglm, train_chatglm2, train_tokenizer_json, write_glm4

_SMALL = {"num_layers": 2, "hidden_size": 16, "padded_vocab_size": 32, "ffn_hidden_size": 16, "kv_channels": 4}
_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message.content | trim }}"
    "{% if message.tools %}{{ message.tools | tojson(indent=4) }}{% endif %}{% endfor %}<|assistant|>"
)


def weights() -> list[dict[str, bytes]]:
    """Every layout of weights."""
    small = {**CAUSAL, **_SMALL}
    prefix = {**PREFIX, "num_layers": 1, "hidden_size": 16, "inner_hidden_size": 16}
    return [
        _files(lambda path: write_checkpoint(path, small)),
        _files(lambda path: write_checkpoint(path, small, num_shards=2)),
        _files(lambda path: write_checkpoint(path, small, suffix="bin")),
        _files(lambda path: write_checkpoint(path, small, suffix="bin", legacy=True)),
        _files(lambda path: write_checkpoint(path, {**small, "quantization_bit": 4})),
        _files(lambda path: write_checkpoint(path, prefix)),
        _files(lambda path: write_checkpoint(path, {**NATIVE, "num_hidden_layers": 1, "vocab_size": 95})),
        _files(lambda path: _converted(path, small)),
    ]


def tokenizers() -> list[dict[str, bytes]]:
    """Every kind of tokenizer beside a config that it fits."""
    wide = {**CAUSAL, "padded_vocab_size": 4096}
    native = {**NATIVE, "vocab_size": 4096}
    prefix = {**PREFIX, "vocab_size": 4096}
    return [
        _files(lambda path: train_chatglm2(path), wide),
        _files(lambda path: train_chatglm(path, do_lower_case=False, num_image_tokens=0), prefix),
        _files(_glm4, {**wide, "_name_or_path": "glm-4"}),
        _files(lambda path: train_tokenizer_json(path, _TEMPLATE), native),
        _files(_with_template_file, native) | {"generation_config.json": b'{"temperature": 0.8, "do_sample": true}'},
    ]


def _files(write: Callable[[Path], object], config: dict[str, object] | None = None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if config is not None:
            (path / "config.json").write_text(json.dumps(config))
        write(path)
        return {file.name: file.read_bytes() for file in path.iterdir()}


def _converted(path: Path, keys: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory) / "model", keys)
        convert(Path(directory) / "model", path, Precision.INT8, None)


def _glm4(path: Path) -> None:
    num_ranks = write_glm4(path)
    names = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES)
    added = {str(num_ranks + index): {"content": name} for index, name in enumerate(names)}
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


def _with_template_file(path: Path) -> None:
    train_tokenizer_json(path)
    (path / "chat_template.jinja").write_text(_TEMPLATE)
