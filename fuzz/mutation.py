"""Spoils bytes, and msgpack values as a tree: the same message with one thing wrong in any place."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgpack

_PACKER = msgpack.Packer()


class Pairs(list[tuple[Any, Any]]):
    """A map that may have a key twice."""


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes in place of a value, valid or not."""

    data: bytes


HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    0.0,
    -0.0,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "x" * 300,
    "x" * 20_000,
    "\0",
    "../../etc/passwd",
    "glmpipe",
    b"",
    b"x",
    [],
    [[]],
    Raw(msgpack.packb([None] * 1100)),
    Pairs(),
    Pairs([("a", 1), ("a", 2)]),
    Pairs([(1, 1)]),
    Pairs([(None, None)]),
    Raw(msgpack.packb({f"key{number}": None for number in range(300)})),
    msgpack.ExtType(5, b""),
    msgpack.ExtType(5, b"abcd"),
    msgpack.Timestamp(0),
    Raw(b"\xd6\xff\xff\xff\xff\xff"),  # a timestamp
    Raw(b"\xa2\xff\xfe"),  # a string that is not UTF-8
    Raw(b"\xa3\xed\xa0\x80"),  # half of a surrogate pair
    Raw(b"\xc1"),  # never used
    Raw(b"\xdd\xff\xff\xff\xff"),  # so many values follow, it claims
    Raw(b"\xdf\xff\xff\xff\xff"),
    Raw(b"\xdb\xff\xff\xff\xff"),
    Raw(b"\xc6\xff\xff\xff\xff"),
    Raw(b"\xc9\xff\xff\xff\xff\x05"),
    Raw(b"\x91" * 400 + b"\xc0"),
    Raw(b"\x91" * 1100 + b"\xc0"),
    Raw(b"\x81\xa1a" * 600 + b"\xc0"),
    Raw(b"\xdc\x02\x00" + b"\x80" * 0x200),
    Raw(b"\xdc\x02\x00" + b"\x90" * 0x200),
)


def spoiled_bytes(data: bytes, other: bytes, rng: Random) -> bytes:
    """One change, anywhere: a bit, a byte, a piece lost, doubled, inserted or taken from `other`."""
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 1, 2, 4, 16, 64, 1024)))
    match rng.randrange(7):
        case 0 if data:
            place = min(start, len(data) - 1)
            return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        case 1:
            return data[:start]
        case 2:
            return data[:start] + data[end:]
        case 3:
            return data[:end] + data[start:end] * rng.choice((1, 2, 50)) + data[end:]
        case 4:
            return data[:start] + rng.randbytes(rng.choice((1, 2, 5, 9))) + data[end:]
        case 5:
            place = rng.randrange(len(other) + 1)
            return data[:start] + other[place : place + rng.choice((1, 8, 64, 4096))] + data[start:]
        case _:
            return data[:start] + other[rng.randrange(len(other) + 1) :]


def spoiled_tree(tree: Any, other: Any, rng: Random, hostile: Sequence[Any] = HOSTILE) -> Any:
    """The tree with one node replaced, lost, doubled, multiplied, or swapped for a part of `other`."""
    paths = list(_paths(tree))
    return _replaced(tree, rng.choice(paths), lambda node: _spoiled_node(node, other, rng, hostile))


def unpack(data: bytes) -> Any:
    """A tree of msgpack bytes, maps as `Pairs`. Raises whatever msgpack raises."""
    return msgpack.unpackb(data, object_pairs_hook=Pairs, strict_map_key=False, raw=False)


def pack(tree: Any) -> bytes:
    """The tree as bytes."""
    if isinstance(tree, Raw):
        return tree.data
    if isinstance(tree, Pairs):
        header: bytes = _PACKER.pack_map_header(len(tree))
        return header + b"".join(pack(key) + pack(value) for key, value in tree)
    if isinstance(tree, list | tuple) and not isinstance(tree, msgpack.ExtType):
        header = _PACKER.pack_array_header(len(tree))
        return header + b"".join(map(pack, tree))
    packed: bytes = _PACKER.pack(tree)
    return packed


def _paths(tree: Any, path: tuple[int, ...] = ()) -> Any:
    """Ways to the nodes, at most some hundred of them: a long list's first entries stand for all."""
    yield path
    if isinstance(tree, list) and len(path) < 8:
        for index, node in enumerate(tree[:40]):
            yield from _paths(node[1] if isinstance(tree, Pairs) else node, (*path, index))


def _replaced(tree: Any, path: tuple[int, ...], change: Any) -> Any:
    if not path:
        return change(tree)
    copy = type(tree)(tree)
    node = tree[path[0]]
    if isinstance(tree, Pairs):
        copy[path[0]] = (node[0], _replaced(node[1], path[1:], change))
    else:
        copy[path[0]] = _replaced(node, path[1:], change)
    return copy


def _spoiled_node(node: Any, other: Any, rng: Random, hostile: Sequence[Any]) -> Any:
    if isinstance(node, list) and node and rng.random() < 0.7:
        return _spoiled_container(node, rng, hostile)
    if isinstance(node, int) and not isinstance(node, bool) and rng.random() < 0.4:
        return max(-(2**63), min(2**64 - 1, node + rng.choice((-1, 1, 2**31, -(2**31), 2**32, node))))
    if isinstance(node, str) and rng.random() < 0.4:
        return rng.choice((node * 2, node[:-1], node.upper(), node + "\0", node * 5000))[: 2**17]
    if rng.random() < 0.3:
        return _part(other, rng)
    return rng.choice(hostile)


def _spoiled_container(node: Any, rng: Random, hostile: Sequence[Any]) -> Any:
    index, kind = rng.randrange(len(node)), type(node)
    match rng.randrange(6):
        case 5:
            return exchanged(node, index, rng.randrange(len(node)))
        case 0:
            return kind([*node[:index], *node[index + 1 :]])
        case 1:
            return kind([*node, node[index]])
        case 2 if len(node) < 50:
            return kind(node * rng.choice((2, 3, 20)))
        case 3:
            return kind(node[::-1])
        case _:
            entry = rng.choice(hostile)
            return kind([*node, (entry, None) if kind is Pairs else entry])


def _part(tree: Any, rng: Random) -> Any:
    for index in rng.choice(list(_paths(tree))):
        tree = tree[index][1] if isinstance(tree, Pairs) else tree[index]
    return tree


def exchanged(node: Any, first: int, second: int) -> Any:
    """Two entries in each other's place; of a map, their values."""
    copy = type(node)(node)
    if isinstance(node, Pairs):
        copy[first], copy[second] = (node[first][0], node[second][1]), (node[second][0], node[first][1])
    else:
        copy[first], copy[second] = node[second], node[first]
    return copy
