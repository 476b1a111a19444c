"""From the last stage's hidden states to the sequences' next tokens."""

import itertools

import torch

from coordinator.errors import GenerationError
from coordinator.scheduler import Chunk
from coordinator.timing import EndsClock
from glm.ends import Head
from glm.errors import faults_as
from glm.logprobs import token_logprobs
from glm.speculation import verify

ROWS_AT_ONCE = 128
"""Rows of logits of a prompt at once, which bounds their memory."""


def next_tokens(head: Head, chunks: tuple[Chunk, ...], hidden: torch.Tensor, clock: EndsClock) -> None:
    """Append to every sequence that a chunk completes; those that have finished meanwhile are left alone.

    What fails for one sequence is that one's error; only the product for all of them fails all of them.

    Args:
        hidden: [num_tokens, hidden_size], the chunks' tokens one after the other.
    """
    starts = itertools.accumulate((len(chunk.token_ids) for chunk in chunks), initial=0)
    parts = [
        (chunk, hidden[start : start + len(chunk.token_ids)]) for chunk, start in zip(chunks, starts, strict=False)
    ]
    with clock.head:
        for chunk, rows in parts:
            if chunk.sequence.wants_prompt_logprobs and not chunk.sequence.is_finished:
                with chunk.sequence.failing("the coordinator could not compute the logits"):
                    _score_prompt(head, chunk, rows)
        live = [(chunk, rows) for chunk, rows in parts if not chunk.sequence.is_finished]
        wanted = [(chunk, rows[chunk.num_tokens - 1 :]) for chunk, rows in live if chunk.completes]
        try:
            with faults_as(GenerationError, "the coordinator could not compute the logits"):
                logits = head.forward(torch.cat([rows for _, rows in wanted])) if wanted else hidden.new_empty(0)
        except GenerationError as error:  # torch says so when a device has no memory left
            for chunk, _ in live:
                chunk.sequence.error = error
            return
    with clock.sampling:
        for (chunk, _), rows in zip(wanted, logits.split([len(rows) for _, rows in wanted]), strict=True):
            with chunk.sequence.failing("the coordinator could not choose a token"):
                _choose(chunk, rows)


def _score_prompt(head: Head, chunk: Chunk, hidden: torch.Tensor) -> None:
    """Log-probabilities of the prompt's tokens, each from the row before it: of those that see none after them."""
    sequence = chunk.sequence
    first = 0 if sequence.layout is None else sequence.layout.context_length
    for row in range(max(0, first - chunk.start_pos), len(hidden), ROWS_AT_ONCE):
        start = chunk.start_pos + row + 1
        next_ids = sequence.token_ids[start : min(start + ROWS_AT_ONCE, chunk.end + 1, sequence.num_prompt)]
        if next_ids:
            logits = head.forward(hidden[row : row + len(next_ids)])
            sequence.prompt_logprobs += token_logprobs(logits, next_ids, sequence.num_logprobs or 0)


def _choose(chunk: Chunk, rows: torch.Tensor) -> None:
    """`rows`: logits, of the chunk's last token and of the drafted ones behind it."""
    sequence = chunk.sequence
    sequence.finish_prompt()
    if sequence.is_finished:
        return

    def ends(token_id: int) -> bool:
        sequence.append(token_id)
        return sequence.is_finished

    new_ids = verify(sequence.sampler, rows, chunk.drafted, ends)
    if sequence.num_logprobs is not None:
        sequence.logprobs += token_logprobs(rows[: len(new_ids)], new_ids, sequence.num_logprobs)
    num_accepted = len(new_ids) - 1
    sequence.num_sent = sequence.num_cached = chunk.end + num_accepted
    if chunk.drafted:
        sequence.num_drafted += len(chunk.drafted)
        sequence.num_accepted += num_accepted
        sequence.draft_length.observe(len(chunk.drafted), num_accepted)
