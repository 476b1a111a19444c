"""The report of an answer: every number the user was promised, and speeds that are divided rightly."""

from coordinator.report import average_tokens_per_s, cut_note, report_lines, warnings
from protocol.client import Finished, GenerationStats, StageStats
from protocol.records import with_changes

STATS = GenerationStats(
    prompt_tokens=50,
    prefill_s=0.5,
    new_tokens=21,
    guarded_tokens=0,
    reused_tokens=0,
    drafted_tokens=0,
    accepted_tokens=0,
    set_backs=0,
    decode_s=2.0,
    total_s=2.5,
    stages=(
        StageStats(1, "cuda:0", "1-12", "int8", compute_s=1.0, wire_s=0.125, kv_tokens=70),
        StageStats(2, "cpu", "13", "fp32", compute_s=0.25, wire_s=0.5, kv_tokens=70),
    ),
    notes=("half of the prompt was cached already",),
)


def test_the_report_names_tokens_seconds_and_speeds() -> None:
    """The first new token belongs to the prefill, so 20 tokens were decoded in 2 s."""
    prompt, answer, total, *_ = report_lines(STATS)
    assert prompt.split() == ["prompt", "50", "tokens", "0.500", "s", "100.0", "tokens/s"]
    assert answer.split() == ["answer", "21", "tokens", "2.000", "s", "10.0", "tokens/s"]
    assert total.split()[:6] == ["total", "71", "tokens", "2.500", "s", "8.4"]
    assert average_tokens_per_s(STATS) == 8.4


def test_speeds_count_what_was_computed() -> None:
    """Tokens that were cached already took no time: of 50, 40 were, so 10 were computed in 0.5 s."""
    prompt, computed, *_ = report_lines(with_changes(STATS, reused_tokens=40))
    assert prompt.split() == ["prompt", "50", "tokens", "0.500", "s", "20.0", "tokens/s"]
    assert computed.strip() == "10 of them computed, which is what the speed counts"


def test_each_stage_has_a_row_with_its_share_of_the_wall_time() -> None:
    """Device, layers, precision, compute seconds, share, wire seconds, KV tokens."""
    header, first, second, note = report_lines(STATS)[3:]
    assert note == "half of the prompt was cached already"
    assert header.split() == ["stage", "device", "layers", "precision", "compute", "share", "wire", "KV", "tokens"]
    assert first.split() == ["1", "cuda:0", "1-12", "int8", "1.000", "s", "40.0", "%", "0.125", "s", "70"]
    assert second.split()[5:8] == ["s", "10.0", "%"]
    assert len(header) == len(first) == len(second)


def test_an_answer_that_took_no_time_is_reported_all_the_same() -> None:
    """One token from the prefill leaves nothing to divide by."""
    lines = report_lines(GenerationStats(3, 0.0, 1, 0, 0, 0, 0, 0, 0.0, 0.0, (), ()))
    assert "0.0 tokens/s" in lines[1]


def test_scores_that_were_no_numbers_are_told() -> None:
    """A broken model is not taken for a silly one: how many tokens stand in for others, and what to try."""
    assert warnings(STATS) == ()
    broken = with_changes(STATS, guarded_tokens=3)
    (warning,) = warnings(broken)
    assert "scores of 3 of 21 tokens were not finite" in warning and "try bf16 or fp32" in warning
    assert report_lines(broken) == (*report_lines(STATS), warning)


def test_an_answer_that_breaks_off_says_why() -> None:
    """By its reason; who asked for so many tokens, or stopped it, knows."""
    told = {
        ("context_full", None): "as the context is full: 50 tokens of prompt and 21 of answer",
        ("context_full", 500): "as the context is full",
        ("length", None): "as max_length or max_new_tokens of the model's generation_config.json says",
    }
    for (reason, asked), said in told.items():
        assert said in cut_note(Finished(1, reason, "", (), STATS), asked)  # type: ignore[arg-type]
    for reason, asked in (("length", 21), ("stop", None), ("stop_string", None), ("cancelled", None)):
        assert cut_note(Finished(1, reason, "", (), STATS), asked) == ""  # type: ignore[arg-type]
