"""What a user may say about how the next token is chosen. Imports nothing heavy: clients without a model use it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glm.errors import SamplingError

# Below it the most likely token is all that is left, and dividing by it would overflow.
COLDEST = 1e-5

# Bounds of what the protocol carries to a running launch.
MOST = 2**31 - 1
NUM_SEEDS = 2**63
MOST_STOP_STRINGS, LONGEST_STOP_STRING = 64, 16384


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when an answer ends, beside the model's own end ids.

    Raises:
        SamplingError: values that are impossible; the message lists all of them.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy."""
    top_k: int = 0
    """Only the k most likely tokens (and those as likely as the last of them); 0 for all."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability; 1 for all."""
    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely one; 0 for all."""
    repetition_penalty: float = 1.0
    """Makes tokens of the prompt and the answer less likely; 1 for no penalty."""
    seed: int | None = None
    """The same seed gives the same tokens; None for another answer each time."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer."""
    max_new_tokens: int | None = None
    """None for as many as the context holds."""
    ignore_eos: bool = False
    """Go on after the model's end ids, to get a fixed number of tokens."""
    greedy: bool = False
    """Always the most likely token."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, it must be {must}"
            for name, (must, holds) in ALLOWED.items()
            if not holds(getattr(self, name))
        ]
        if faults:
            raise SamplingError("; ".join(faults))

    @property
    def is_greedy(self) -> bool:
        return self.greedy or self.temperature < COLDEST


def chosen_over(given: Mapping[str, Any]) -> dict[str, Any]:
    """What to change of a model's defaults where somebody has given these params.

    A temperature, or another rule for choosing among tokens, asks for a choice: greedy by default is not meant then.
    """
    chooses = any(name in given for name in ("temperature", "top_k", "top_p", "min_p"))
    return {**({"greedy": False} if chooses else {}), **given}


def seed_after(seed: int | None, number: int) -> int | None:
    """The seed so many further on; after the greatest one comes 0, so that every seed has successors."""
    return None if seed is None else (seed + number) % NUM_SEEDS


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _are_stop_strings(value: object) -> bool:
    if not isinstance(value, tuple) or len(value) > MOST_STOP_STRINGS:
        return False
    return all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP_STRING for text in value)


ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number from 0 (greedy) to 100", lambda v: _is_number(v, 0, 100)),
    "top_k": ("a whole number from 0 (all tokens) up", lambda v: _is_whole(v, 0, MOST)),
    "top_p": ("a number above 0 and up to 1 (all tokens)", lambda v: _is_number(v, 0, 1) and v > 0),
    "min_p": ("a number from 0 (all tokens) to 1", lambda v: _is_number(v, 0, 1)),
    "repetition_penalty": ("a number from 0.01 to 100 (1 for none)", lambda v: _is_number(v, 0.01, 100)),
    "seed": ("a whole number from 0 up, or none", lambda v: v is None or _is_whole(v, 0, NUM_SEEDS - 1)),
    "stop": (
        f"at most {MOST_STOP_STRINGS} texts of 1 to {LONGEST_STOP_STRING} characters",
        _are_stop_strings,
    ),
    "max_new_tokens": ("a whole number from 1 up, or none", lambda v: v is None or _is_whole(v, 1, MOST)),
    "ignore_eos": ("true or false", lambda v: isinstance(v, bool)),
    "greedy": ("true or false", lambda v: isinstance(v, bool)),
}
"""Of each param: what it must be, in words and as a check."""
