"""What an answer cost, in lines for a terminal."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence

from glm.logprobs import TokenLogprob
from glm.printable import num_columns, padded
from protocol.client import Finished, GenerationStats

_COLUMNS = ("stage", "device", "layers", "precision", "compute", "share", "wire", "KV tokens")
_ROOMY = 90  # columns for all that is said of the whole
_WHERE = 4  # the columns about where a stage is; the others are about what it did


def report_lines(stats: GenerationStats, width: int | None = None) -> tuple[str, ...]:
    """Prompt, answer and total with their speed, then a table of the stages, notes, and warnings.

    In `width` columns, None for as many as it takes. Speeds count tokens that were computed, not those of the prompt
    that were cached already. The first new token comes out of the prefill, so decoding is timed over the others.
    `share` is the part of the whole time that a stage computed; what is missing to 100 % went into the ends, sampling,
    and the wire.
    """
    table: list[tuple[str, ...]] = [_COLUMNS]
    for stage in stats.stages:
        table.append(
            (
                str(stage.stage_number),
                stage.device,
                stage.layers,
                stage.precision,
                f"{stage.compute_s:.3f} s",
                f"{_ratio(100 * stage.compute_s, stats.total_s):.1f} %",
                f"{stage.wire_s:.3f} s",
                str(stage.kv_tokens),
            )
        )
    num_computed = stats.prompt_tokens - stats.reused_tokens
    return (
        _line("prompt", stats.prompt_tokens, stats.prefill_s, _ratio(num_computed, stats.prefill_s)),
        *([f"         {num_computed} of them computed, which is what the speed counts"] if stats.reused_tokens else []),
        _line("answer", stats.new_tokens, stats.decode_s, _ratio(stats.new_tokens - 1, stats.decode_s)),
        _line("total", stats.prompt_tokens + stats.new_tokens, stats.total_s, average_tokens_per_s(stats))
        + (" (new tokens over the whole time)" if width is None or width >= _ROOMY else ""),
        *_fitting(table, width),
        *stats.notes,
        *warnings(stats),
    )


def warnings(stats: GenerationStats) -> tuple[str, ...]:
    """What a user should hear of even without asking what the answer cost."""
    if not stats.guarded_tokens:
        return ()
    return (
        f"warning: the scores of {stats.guarded_tokens} of {stats.new_tokens} tokens were not finite, so that a fixed "
        "token stands in their places: the arithmetic overflows, or weights are damaged; try bf16 or fp32",
    )


def cut_note(finished: Finished, max_new_tokens: int | None) -> str:
    """A line about an answer that ends where neither the model nor the user ended it; empty for others.

    `max_new_tokens`: what the user said, None for nothing.
    """
    stats = finished.stats
    num_tokens = f"{stats.prompt_tokens} tokens of prompt and {stats.new_tokens} of answer"
    if finished.finish_reason == "context_full":
        return f"the answer breaks off here, as the context is full: {num_tokens}"
    if finished.finish_reason == "length" and max_new_tokens is None:
        return (
            f"the answer breaks off here, after {num_tokens}, as max_length or max_new_tokens of the model's "
            "generation_config.json says: another max_new_tokens allows more"
        )
    return ""


def logprob_lines(logprobs: Iterable[TokenLogprob], spell: Callable[[int], str]) -> Iterator[str]:
    """A line for each token: its log-probability, its id and what that stands for; then the likeliest ones."""
    for each in logprobs:
        others = ", ".join(f"{token_id} {spell(token_id)} {logprob:.3f}" for token_id, logprob in each.top)
        line = f"{each.logprob:9.3f}  {each.token_id:>6} {padded(spell(each.token_id), 12)}"
        yield f"{line}  likeliest: {others}" if others else line.rstrip()


def average_tokens_per_s(stats: GenerationStats) -> float:
    """New tokens over the whole time, the prefill included."""
    return _ratio(stats.new_tokens, stats.total_s)


def two_columns(rows: Sequence[tuple[str, str]], width: int | None = None) -> list[str]:
    """Names and what is said of them, side by side; in fewer columns than that takes, one below the other."""
    longest = max(num_columns(name) for name, _ in rows)
    lines = [f"{padded(name, longest)}   {text}" for name, text in rows]
    if width is None or max(map(num_columns, lines)) <= width:
        return lines
    indent = "    "
    return [
        line
        for name, text in rows
        for line in (name, *textwrap.wrap(text, max(20, width), initial_indent=indent, subsequent_indent=indent))
    ]


def _line(name: str, num_tokens: int, seconds: float, tokens_per_s: float) -> str:
    return f"{name:<8} {num_tokens:>6} tokens  {seconds:>8.3f} s  {tokens_per_s:>8.1f} tokens/s"


def _ratio(amount: float, whole: float) -> float:
    return amount / whole if whole > 0 else 0.0


def _fitting(table: list[tuple[str, ...]], width: int | None) -> list[str]:
    """The table; where it is too wide, one of where the stages are and one of what they did."""
    lines = _aligned(table)
    if width is None or max(map(len, lines)) <= width:
        return lines
    places = [row[:_WHERE] for row in table]
    return [*_aligned(places), *_aligned([(row[0], *row[_WHERE:]) for row in table])]


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
