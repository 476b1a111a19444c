"""What ended sequences left: the right one is found, in as many steps as its text is long, however many there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import kept_prefixes
from coordinator.kept_prefixes import KeptPrefixes

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
ACTS = st.lists(st.tuples(st.sampled_from(["keep", "longest", "take", "evict"]), TEXTS), max_size=40)


def shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(map(len, (first, second))),
    )


@given(acts=ACTS)
def test_equal_to_looking_at_all_of_them(acts: list[tuple[str, tuple[int, ...]]]) -> None:
    """Any order of keeping, looking up, taking over and evicting: what a plain list of all would say."""
    kept, plain = KeptPrefixes(), dict[int, tuple[int, ...]]()
    for kv_id, (act, text) in enumerate(acts):
        if act == "keep":
            contained = [old_id for old_id, old in plain.items() if text[: len(old)] == old]
            assert sorted(kept.keep(kv_id, text)) == contained
            plain = {old_id: old for old_id, old in plain.items() if old_id not in contained} | {kv_id: text}
        elif act == "longest":
            found, num_shared = kept.longest(text)
            assert num_shared == max((shared(old, text) for old in plain.values()), default=0)
            assert (found is None) == (num_shared == 0)
            if found is not None:
                assert plain[found.kv_id] == found.token_ids and shared(found.token_ids, text) == num_shared
                plain[found.kv_id] = plain.pop(found.kv_id)
        elif act == "take" and plain:
            kept.take(min(plain))
            del plain[min(plain)]
        elif act == "evict":
            evicted = kept.evict(len(text))
            assert evicted == list(plain)[: len(evicted)]
            assert sum(len(plain.pop(each)) for each in evicted) >= len(text) or not plain
        assert (len(kept), kept.num_tokens) == (len(plain), sum(map(len, plain.values())))


class _Counted(int):
    """A token id that counts how often one of its kind is compared."""

    num_compared = 0

    def __eq__(self, other: object) -> bool:
        _Counted.num_compared += 1
        return int(self) == other

    __hash__ = int.__hash__


@pytest.mark.parametrize("num_kept", [100, 3000])
def test_a_look_up_costs_what_the_text_costs(num_kept: int) -> None:
    """However many are kept that begin alike: each of the new text's tokens is compared a few times at most."""
    opening = list(range(1000, 1100))
    kept = KeptPrefixes()
    for kv_id in range(num_kept):
        kept.keep(kv_id, [*opening, kv_id, 7, 8])
    asked = [_Counted(token_id) for token_id in [*opening, num_kept // 2, 7, 9]]
    _Counted.num_compared = 0
    found, num_shared = kept.longest(asked)
    assert found is not None and (found.kv_id, num_shared) == (num_kept // 2, 102)
    assert 0 < _Counted.num_compared <= 10 * len(asked)


def test_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short they are: those not used for longest are forgotten, and the stages told so."""
    monkeypatch.setattr(kept_prefixes, "MOST_KEPT", 3, raising=False)
    kept = KeptPrefixes()
    assert [kept.keep(kv_id, (kv_id,)) for kv_id in range(3)] == [[], [], []]
    kept.longest((0,))
    assert kept.keep(3, (3,)) == [1]
    assert [kept.longest((kv_id,))[1] for kv_id in range(4)] == [1, 0, 1, 1]
