"""How many decode steps are in flight at once: found by trying, because it depends on what the stages share.

Stages on devices of their own want one step each; stages that share a host's cores or memory may be faster with all
sequences in one step. No formula knows that, so neighbouring settings are measured one against the other, in turns.
"""

from dataclasses import dataclass, field

ROUNDS = 4
"""A window lasts so many rounds of all sequences, after one that lets the chain settle."""
REST_ROUNDS = 100
"""So many rounds without trials between two: a trial of a poor setting costs little of the whole."""
WORTH = 1.015
"""A setting must be so much better than the present one to replace it."""


@dataclass(slots=True)
class _Size:
    """What is known for one number of sequences; `ratios` are tokens/s of other settings beside the present one's."""

    chosen: int
    untried: list[int]
    ratios: dict[int, float] = field(default_factory=dict)
    trial: int | None = None
    before: float | None = None
    during: float | None = None
    rest: int = 0
    next_trial: int = 0


class Pacing:
    """Chooses 1 ... `most` steps in flight for each number of sequences. No clock of its own."""

    def __init__(self, most: int, fixed: int | None = None) -> None:
        self._most = most
        self._fixed = fixed
        self._sizes: dict[int, _Size] = {}
        self._size: int | None = None
        self._last_size = 0
        self._window_setting = 0
        self._settling = 0
        self._started_at_s = 0.0
        self._num_tokens = 0

    def choose(self, num_sequences: int) -> int:
        """How many decode steps to have in flight now."""
        most = max(1, min(self._most, num_sequences))
        if self._fixed is not None:
            return min(self._fixed, most)
        if most == 1:
            return 1
        state = self._state(num_sequences)
        return min(most, state.trial or state.chosen)

    def disturb(self) -> None:
        """What is under way is no fair measure: a prompt is being fed, or the sequences have changed."""
        self._size = None

    def observe(self, num_sequences: int, num_in_step: int, now_s: float) -> None:
        """A decode step came back, with so many of the sequences in it."""
        setting = self.choose(num_sequences)
        self._last_size = num_sequences
        if self._fixed is not None or num_sequences < 2 or self._most == 1:
            return
        if self._size != num_sequences or self._window_setting != setting:
            self._size, self._window_setting = num_sequences, setting
            self._settling, self._num_tokens = num_sequences, 0
        if self._settling > 0:
            self._settling -= num_in_step
            self._started_at_s = now_s
            return
        self._num_tokens += num_in_step
        if self._num_tokens >= ROUNDS * num_sequences:
            self._window_ended(self._state(num_sequences), self._num_tokens / max(1e-9, now_s - self._started_at_s))
            self._started_at_s, self._num_tokens = now_s, 0

    def has_tried_all(self, num_sequences: int) -> bool:
        """Whether every setting for so many sequences was measured once, or there is nothing to choose."""
        most = min(self._most, num_sequences)
        return self._fixed is not None or most < 2 or len(self._state(num_sequences).ratios) == most - 1

    def reason(self) -> str | None:
        """What was chosen for the sequences that decoded last, and why, for people; None where there is no choice."""
        num_sequences = self._last_size
        setting = self.choose(num_sequences)
        if min(self._most, num_sequences) < 2:
            return None
        share = -(-num_sequences // setting)
        what = f"{num_sequences} sequences in {setting} step{'s' * (setting > 1)} of {share} in flight"
        if self._fixed is not None:
            return f"{what}: as asked for"
        ratios = self._state(num_sequences).ratios
        found = ", ".join(f"{other} would give {ratio:.2f}x the tokens/s" for other, ratio in sorted(ratios.items()))
        return f"{what}: {found or 'too few steps yet to try other numbers of steps'}"

    def _state(self, num_sequences: int) -> _Size:
        state = self._sizes.get(num_sequences)
        if state is None:
            most = max(1, min(self._most, num_sequences))
            known = [n for n in self._sizes if n <= 2 * num_sequences and num_sequences <= 2 * n]
            nearest = min(known, key=lambda n: abs(n - num_sequences), default=None)
            first = min(most, self._sizes[nearest].chosen if nearest is not None else max(1, self._most - 1))
            state = _Size(first, [n for n in range(1, most + 1) if n != first])
            self._sizes[num_sequences] = state
        return state

    def _window_ended(self, state: _Size, rate: float) -> None:
        """Windows go: the present setting, the one on trial, the present one again; then a verdict."""
        if state.trial is not None:
            state.during, state.next_trial, state.trial = rate, state.trial, None
        elif state.during is not None:
            assert state.before is not None
            ratio = state.during / ((state.before + rate) / 2)
            state.before, state.during = rate, None
            self._judge(state, state.next_trial, ratio)
        else:
            state.before = rate
            state.rest -= ROUNDS
        if state.during is None and state.before is not None:
            self._begin_trial(state)

    def _begin_trial(self, state: _Size) -> None:
        if state.untried:
            state.trial = state.untried.pop(0)
        elif state.rest <= 0 and state.ratios:
            state.trial = max(state.ratios, key=lambda n: state.ratios[n])
            state.ratios[state.trial] *= 0.999  # so that the others have their turn, too
            state.rest = REST_ROUNDS

    def _judge(self, state: _Size, setting: int, ratio: float) -> None:
        """A setting replaces the present one when two trials together say so: one alone may have been luck."""
        known = state.ratios.get(setting)
        state.ratios[setting] = ratio if known is None else (known + ratio) / 2
        if state.ratios[setting] < WORTH:
            return
        if known is None or known < 1:
            state.untried.insert(0, setting)
            return
        ratio = state.ratios.pop(setting)
        state.ratios = {other: value / ratio for other, value in state.ratios.items()}
        state.ratios[state.chosen] = 1 / ratio
        state.chosen, state.before = setting, None
        state.rest = REST_ROUNDS
