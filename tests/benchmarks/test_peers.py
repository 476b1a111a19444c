"""The comparison with llama.cpp: its options, what is read from the other side, and the table of ratios."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.comparison import Comparison, spread, table
from benchmarks.llama_cpp import LlamaCpp, LlamaCppError, Speed, command, parse_speed
from benchmarks.peers import comparisons, parse

PRINTED = """
noise
{"pp": 64, "tg": 24, "pl": 8, "t_pp": 21.3, "speed_pp": 24.004045, "t_tg": 12.7, "speed_tg": 15.106853}
"""


def test_speeds_are_read_from_what_the_program_prints() -> None:
    """The line of JSON among others; without one the error quotes what there was."""
    assert parse_speed(PRINTED) == Speed(24.004045, 15.106853)
    with pytest.raises(LlamaCppError, match="no such model"):
        parse_speed("no such model")


def test_its_context_holds_all_sequences_and_servers_get_all_layers() -> None:
    """8 sequences of 64 + 24 tokens need 704; with servers, every layer goes to them."""
    words = command(2, Path("m.gguf"), 64, 24, 8, ())
    assert words[words.index("-c") + 1] == "704"
    assert "--rpc" not in words
    words = command(2, Path("m.gguf"), 512, 32, 1, ("127.0.0.1:1", "127.0.0.1:2"))
    assert words[-4:] == ["--rpc", "127.0.0.1:1,127.0.0.1:2", "-ngl", "99"]


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    """Before anything is loaded."""
    gguf = tmp_path / "m.gguf"
    gguf.touch()
    with pytest.raises(LlamaCppError, match="llama-batched-bench is not there"):
        LlamaCpp(tmp_path, gguf, 2)


def test_ratios_are_those_of_one_round_and_their_median_counts() -> None:
    """A round in which everything was half as fast changes no ratio."""
    row = Comparison("int4", "decode", "tokens/s", (20.0, 10.0, 30.0), (10.0, 5.0, 20.0), target=2.0)
    assert row.ratios == (2.0, 2.0, 1.5)
    assert (row.achieved, row.is_met) == (2.0, True)
    assert Comparison("int4", "decode", "tokens/s", (20.0,), (), target=2.0).is_met is None
    assert Comparison("int4", "efficiency", "share", (0.8, 0.9, 0.7), (), target=0.85).is_met is False


def test_the_table_shows_median_least_and_most() -> None:
    """One figure stands alone; what was not measured is empty."""
    assert spread((3.0, 12.0, 1.0)) == "3.00 (1.00 - 12.0)"
    assert (spread((0.5,)), spread(())) == ("0.50", "")
    rows = [Comparison("int4", "decode", "tokens/s", (20.0,), (10.0,), 1.05), Comparison("int8", "x", "share", (0.5,))]
    assert table(rows, "llama.cpp").splitlines()[2:] == [
        "| int4 | decode, tokens/s | 20.0 | 10.0 | 2.00 | 1.05 | met |",
        "| int8 | x, share | 0.50 |  |  |  |  |",
    ]


def test_rows_follow_from_the_rounds_of_each_part() -> None:
    """What is left beside a busy process, and of one stage's speed over two, are shares of the same round."""
    found = {
        "single": [{"decode": 10.0, "decode, theirs": 8.0, "prefill": 50.0, "decode efficiency": 0.9}],
        "stages": [{"decode": 9.0, "decode, theirs": 3.0, "prefill": 45.0}],
        "contention": [{"alone": 10.0, "alone, theirs": 8.0, "beside": 6.0, "beside, theirs": 0.4}],
    }
    rows = {row.what: row for row in comparisons("int4", found)}
    assert rows["decode at context 512"].is_met is True
    assert rows["prefill of 512"].achieved is None
    assert rows["decode, of reading the weights"].is_met is True
    assert rows["two stages: decode at context 512"].achieved == 3.0
    assert rows["two stages beside one: decode"].ours == (0.9,)
    left = rows["left beside a busy process"]
    assert (left.ours, left.theirs) == ((0.6,), (0.05,))
    assert "decode of 8 sequences at once" not in rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gguf-int4", "m.gguf"], "say where that is with --llama-cpp"),
        (["--llama-cpp", "bin", "--gguf-int4", "m.gguf"], "--gguf-int8 is missing: make one"),
        (["--rounds", "0"], "1 or more"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what to do about it."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_without_the_other_side_ours_is_measured_alone() -> None:
    """bf16 needs no file of theirs."""
    assert parse([]).llama_cpp is None
    assert parse(["--llama-cpp", "bin", "--precisions", "bf16"]).precisions == ["bf16"]
