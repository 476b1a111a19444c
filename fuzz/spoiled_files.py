"""Spoils files each in its own way: JSON and headers of safetensors as trees, the rest as bytes."""

import json
from random import Random
from typing import Any

from fuzz.mutation import Pairs, Raw, exchanged, spoiled_bytes, spoiled_tree

HOSTILE_JSON: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    3,
    2**31 - 1,
    2**31,
    2**63,
    2**70,
    0.5,
    "",
    "x",
    "x" * 5000,
    "\0",
    "../secret.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "link.safetensors",
    "model.safetensors",
    "a" * 300,
    "~nobody/x",
    "<|user|>",
    "[gMASK]",
    "F64",
    "F16",
    "BF16",
    "int4",
    "{{ 1 / 0 }}{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 9999999999 }}",
    [],
    {},
    [0, 8],
    [8, 0],
    [0, 2**62],
    [2**40, 2**40],
    [[]],
    {"type": "Split", "pattern": {"Regex": "^(l|l|H)*$"}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"Regex": "[a-z]*"}, "content": "l" * 3000},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 3000}] * 4},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
    Raw(b"NaN"),
    Raw(b"1e999"),
    Raw(b"-1e999"),
    Raw(b"9" * 5000),
    Raw(b'"\\ud800"'),
    Raw(b'"\xff\xfe"'),
    Raw(b"[" * 900 + b"]" * 900),
    Raw(b"[" * 100_000),
    Raw(b'{"a":' * 900 + b"1" + b"}" * 900),
    Raw(b'{"a":1,"a":2}'),
)
PIECES = (
    b"version https://git-lfs.github.com/spec/v1\n",
    b"{% for x in range(99999) %}{% for y in range(99999) %}{{ x }}{% endfor %}{% endfor %}",
    b"{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    b"{{ 'x' * 9999999999 }}",
    b"{{ 9 ** 9 ** 9 }}",
    b"{{ ''.__class__.__mro__ }}",
    b"{% include '/etc/passwd' %}",
    b"{{ messages[99].content.x.y }}",
    b"{{ '%99999999999d' % 1 }}",
    b"{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    b'[[stage]]\ndevice = "cpu"\nlayers = "1-2"\n',
    b"x = " + b"[" * 3000 + b"]" * 3000 + b"\n",
    b"max_num_seqs = " + b"9" * 5000 + b"\n",
    b'model = "~nobody/x"\n',
    b'kv_budget = "1e999GiB"\n',
    b"\xff\xfe",
    b"\0" * 64,
    b"IQ== 3\n",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"cos\nsystem\n(S'true'\ntR.",
)


def spoiled_file(name: str, data: bytes, other: bytes, rng: Random) -> bytes:
    """The content of a file of that name with something wrong in it."""
    if rng.random() < 0.25:
        return spoiled_bytes(data, rng.choice((other, *PIECES)), rng)
    if name.endswith(".json"):
        return _spoiled_json(data, other, rng)
    if name.endswith(".jsonl"):
        lines = data.split(b"\n")
        index = rng.randrange(len(lines))
        lines[index] = _spoiled_json(lines[index], other, rng)
        return b"\n".join(lines)
    if name.endswith(".safetensors") and len(data) > 8:
        return _spoiled_safetensors(data, rng)
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice(PIECES) + data[place if rng.random() < 0.5 else min(len(data), place + 40) :]


def to_json(tree: Any) -> bytes:
    """The tree, which may have keys twice, as JSON."""
    if isinstance(tree, Raw):
        return tree.data
    if isinstance(tree, Pairs):
        return b"{" + b",".join(to_json(str(key)) + b":" + to_json(value) for key, value in tree) + b"}"
    if isinstance(tree, list):
        return b"[" + b",".join(map(to_json, tree)) + b"]"
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _spoiled_json(data: bytes, other: bytes, rng: Random) -> bytes:
    try:
        tree = json.loads(data, object_pairs_hook=Pairs)
        return to_json(spoiled_tree(tree, rng.choice(HOSTILE_JSON), rng, HOSTILE_JSON))
    except Exception:  # spoiled before
        return spoiled_bytes(data, other, rng)


def _spoiled_safetensors(data: bytes, rng: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    header = _with_two_exchanged(header, rng) if rng.random() < 0.2 else _spoiled_json(header, b"", rng)
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**20, 2**40, 2**64 - 1))
    return said.to_bytes(8, "little") + header + data[8 + length :]


def _with_two_exchanged(header: bytes, rng: Random) -> bytes:
    """Two tensors in each other's place: all that is said of them stays consistent if they are alike."""
    try:
        tree = json.loads(header, object_pairs_hook=Pairs)
        return to_json(exchanged(tree, rng.randrange(len(tree)), rng.randrange(len(tree))))
    except Exception:  # spoiled before
        return header
