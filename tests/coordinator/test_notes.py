"""Notes about other hosts: bounded in number, one line each."""

from coordinator.notes import INTERVAL_S, MOST_NOTES, FewNotes


def test_a_flood_of_notes_becomes_a_few_and_a_number() -> None:
    """So many an interval; the rest is counted when the next one begins."""
    now_s, said = 0.0, []
    notes = FewNotes(said.append, clock=lambda: now_s)
    for number in range(MOST_NOTES + 7):
        notes(f"note {number}")
    assert said == [f"note {number}" for number in range(MOST_NOTES)]
    now_s = INTERVAL_S
    notes("later")
    assert said[MOST_NOTES:] == ["7 more notes about workers of other hosts were left out", "later"]


def test_a_note_is_one_line_whatever_it_quotes() -> None:
    """A device called after an escape sequence clears no terminal, one with a line break forges no line."""
    said: list[str] = []
    FewNotes(said.append)("refused \x1b[2J\n[pipeline] all is well\u2028 你好")
    assert said == ["refused \\x1b[2J [pipeline] all is well 你好"]
