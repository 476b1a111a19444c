"""Which rounds of a conversation a prompt leaves out, so that it and its answer fit into a context: pure."""

from collections.abc import Sequence
from typing import Literal

from coordinator.conversation import Round

Overflow = Literal["slide", "stop"]
OVERFLOWS: tuple[Overflow, ...] = ("slide", "stop")
"""What a chat does when its conversation fills the context: leave the oldest rounds out, or say so alone."""

ANSWER_SHARE = 4
"""One part in so many of the context is kept for the answer, unless `max_new_tokens` asks for less."""


def room_for_answer(max_context: int, max_new_tokens: int | None) -> int:
    """So many tokens a prompt should leave."""
    share = max_context // ANSWER_SHARE
    return share if max_new_tokens is None else min(share, max_new_tokens)


def num_to_leave_out(rounds: Sequence[Round], others: int, most: int) -> int:
    """How many of the oldest rounds must go, so that the rest and `others` tokens have at most `most` together.

    All of them where even that is not enough.
    """
    total = others + sum(each.num_tokens for each in rounds)
    for number, each in enumerate(rounds):
        if total <= most:
            return number
        total -= each.num_tokens
    return len(rounds)


def left_out_line(left_out: Sequence[Round], max_context: int) -> str:
    """What to say of rounds that are left out from now on."""
    number, num_tokens = len(left_out), sum(each.num_tokens for each in left_out)
    what = "the oldest question and its answer" if number == 1 else f"the {number} oldest questions and their answers"
    return (
        f"the context of {max_context} tokens is full: {what} (about {num_tokens} tokens) are left out from here on; "
        "/save still writes them, `clear` starts afresh"
    )
