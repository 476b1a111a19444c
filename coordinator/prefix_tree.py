"""Token sequences by their beginnings: which of many shares most with a new one, in one walk down a tree."""

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence


class PrefixTree:
    """A radix tree: each edge carries the tokens up to the next place where sequences part, or where one ends.

    A walk costs as much as the sequence is long, however many there are.
    """

    def __init__(self) -> None:
        self._root = _Node(())

    def add(self, key: int, token_ids: AbstractSequence[int]) -> None:
        """Remember a sequence, at least one token long; one with the same tokens is replaced."""
        node, rest = self._root, tuple(token_ids)
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                child = node.children[rest[0]] = _Node(rest)
            else:
                common = common_length(child.tokens, rest)
                if common < len(child.tokens):
                    child = node.children[rest[0]] = child.split(common)
            node, rest = child, rest[len(child.tokens) :]
        node.key = key

    def remove(self, token_ids: AbstractSequence[int]) -> None:
        """Forget a sequence that was added."""
        path = [self._root, *self._walk(token_ids)]
        path[-1].key = None
        for parent, node in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):
            if node.key is not None or len(node.children) > 1:
                return
            if node.children:
                [child] = node.children.values()
                parent.children[node.tokens[0]] = _Node(node.tokens + child.tokens, child.key, child.children)
            else:
                del parent.children[node.tokens[0]]

    def contained_in(self, token_ids: AbstractSequence[int]) -> list[int]:
        """The keys of those that `token_ids` begins with, or equals."""
        return [node.key for node in self._walk(token_ids) if node.key is not None]

    def longest(self, token_ids: AbstractSequence[int]) -> tuple[int | None, int]:
        """The key of one that shares most tokens from the start on, and how many; None and 0 where none shares any."""
        node, num_shared = self._root, 0
        for found in self._walk(token_ids):
            node, num_shared = found, num_shared + len(found.tokens)
        rest = tuple(token_ids[num_shared:])
        further = node.children.get(rest[0]) if rest else None
        if further is not None:
            node, num_shared = further, num_shared + common_length(further.tokens, rest)
        return (node.any_key() if num_shared else None), num_shared

    def _walk(self, token_ids: AbstractSequence[int]) -> "Iterator[_Node]":
        """The nodes whose whole edges lie on the way of these tokens."""
        node, start = self._root, 0
        while start < len(token_ids):
            child = node.children.get(token_ids[start])
            if child is None or tuple(token_ids[start : start + len(child.tokens)]) != child.tokens:
                return
            yield child
            node, start = child, start + len(child.tokens)


class _Node:
    """`tokens` lead to it from its parent; `key` is that of the sequence that ends here, if one does."""

    __slots__ = ("children", "key", "tokens")

    def __init__(
        self, tokens: tuple[int, ...], key: int | None = None, children: "dict[int, _Node] | None" = None
    ) -> None:
        self.tokens = tokens
        self.key = key
        self.children = {} if children is None else children

    def split(self, length: int) -> "_Node":
        """A node after so many of its tokens, with this one as its only child."""
        first, self.tokens = self.tokens[:length], self.tokens[length:]
        return _Node(first, None, {self.tokens[0]: self})

    def any_key(self) -> int:
        """Of one that leads through here; there is one in every node but an empty root."""
        node = self
        while node.key is None:
            node = next(iter(node.children.values()))
        return node.key


def common_length(first: AbstractSequence[int], second: AbstractSequence[int]) -> int:
    """How many tokens from the start on are the same: a search by halves, so that long texts cost little."""
    low, high = 0, min(len(first), len(second))
    first, second = tuple(first[:high]), tuple(second[:high])
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
