"""A short run of every fuzzing target; `make fuzz` runs a million of each."""

from random import Random

import pytest

from fuzz.target import Finding, allocating_at_most
from fuzz.targets import TARGETS, load_target

NUM_INPUTS = {"frames": 2000, "weights": 300, "quantized": 150, "tokenizer": 100, "plan": 1000, "prompts": 1000}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_valid_and_mutations_do_no_harm(name: str) -> None:
    """Inputs that no target was written with in mind raise what they may raise, and cost what they may cost."""
    target, rng = load_target(name), Random(7)
    seeds = target.seeds()
    for seed in seeds:
        target.check(seed)
    for _ in range(NUM_INPUTS[name]):
        data = target.mutate(rng.choice(seeds), rng.choice(seeds), rng)
        if rng.random() < 0.2:
            data = target.mutate(data, rng.choice(seeds), rng)
        target.check(data)


def test_an_allocation_beyond_the_limit_is_found() -> None:
    """The meter itself works, also for what is freed again."""
    with pytest.raises(Finding, match="at most"), allocating_at_most(2**20):
        bytes(2**21)
    with allocating_at_most(2**20):
        bytes(2**19)
