"""How many steps are in flight follows from measured speed, survives noise, and costs little to find out."""

import random

import pytest

from coordinator.pacing import Pacing


def run(pacing: Pacing, num_sequences: int, rates: dict[int, float], num_rounds: int, noise: float = 0.0) -> list[int]:
    """Rounds of steps at these tokens/s by setting; the setting of every round."""
    choice, now_s, settings = random.Random(1), 0.0, []
    for _ in range(num_rounds):
        setting = pacing.choose(num_sequences)
        settings.append(setting)
        left = num_sequences
        while left:
            share = min(left, -(-num_sequences // setting))
            now_s += share / rates[setting] * (1 + choice.uniform(-noise, noise))
            pacing.observe(num_sequences, share, now_s)
            left -= share
    return settings


@pytest.mark.parametrize("best", [1, 2, 3])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_fastest_setting_is_found_and_kept(best: int, noise: float) -> None:
    """Whatever is the best of three; also where steps differ by a fifth from one another."""
    rates = {setting: 100.0 if setting == best else 70.0 for setting in (1, 2, 3)}
    pacing = Pacing(3)
    settings = run(pacing, 8, rates, 1000, noise)
    assert settings[100:].count(best) > 0.93 * len(settings[100:])
    spent = sum(8 / rates[setting] for setting in settings[100:])
    assert spent < 1.03 * 8 / rates[best] * len(settings[100:])


def test_equal_settings_are_left_as_they_are() -> None:
    """No going back and forth for nothing."""
    pacing = Pacing(3)
    settings = run(pacing, 4, dict.fromkeys((1, 2, 3), 50.0), 500)
    assert settings[100:].count(2) > 0.9 * len(settings[100:])


def test_what_was_asked_for_is_not_measured() -> None:
    """A fixed number holds, as far as there are sequences."""
    pacing = Pacing(4, fixed=3)
    assert [pacing.choose(n) for n in (1, 2, 8)] == [1, 2, 3]
    run(pacing, 8, {3: 10.0}, 20)
    assert pacing.reason() == "8 sequences in 3 steps of 3 in flight: as asked for"


def test_the_reason_names_the_others_ratios() -> None:
    """For the report: what was chosen, and what the others would have given."""
    pacing = Pacing(2)
    run(pacing, 6, {1: 40.0, 2: 80.0}, 100)
    assert pacing.reason() == "6 sequences in 2 steps of 3 in flight: 1 would give 0.50x the tokens/s"


def test_a_disturbed_window_does_not_count() -> None:
    """A prompt fed in between makes steps seem slow: what was measured until then is thrown away."""
    pacing = Pacing(2)
    run(pacing, 6, {1: 40.0, 2: 80.0}, 60)
    chosen = pacing.choose(6)
    pacing.disturb()
    pacing.observe(6, 3, 10_000.0)
    assert pacing.choose(6) == chosen
