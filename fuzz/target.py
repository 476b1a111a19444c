"""What a fuzzing target is, and what it may cost."""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random


class Finding(Exception):  # noqa: N818 - what a fuzzer is after
    """An input did what no input may do."""


@dataclass(frozen=True, slots=True)
class Target:
    """Something that reads what others wrote.

    `seeds` are valid inputs, `mutate` spoils one (with another at hand to take parts from), `check` reads one and
    raises Finding, or whatever the reader should not have raised.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    mutate: Callable[[bytes, bytes, Random], bytes]
    check: Callable[[bytes], None]


@contextmanager
def allocating_at_most(num_bytes: int) -> Iterator[None]:
    """Raises Finding if Python's memory rose by more at any time within."""
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
        if peak > num_bytes:
            raise Finding(f"{peak} bytes were allocated, {num_bytes} at most are allowed")
    finally:
        if not tracing:
            tracemalloc.stop()
