"""What keeping every stage busy gains, over two stages of one core each: in turns, within one launch.

    python -m benchmarks.scheduling [--parts streams prefill] [--rounds 5] [--tokens 6] [--prompt 2048] [--json FILE]

The ChatGLM2-6B shape with random weights in int4, lm_head in int4, one thread for each stage.

`streams`: 8 streams as two steps of 4 in flight beside 4 streams in one step; all numbers of steps in flight for 8
streams, beside the number that is found automatically; how busy the stages are meanwhile. `prefill`: a long prompt in
chunks beside the same prompt in one piece. `--pin` gives each stage a core of its own.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks.figures import Figure, in_turns, options_parser, over, publish, say
from benchmarks.peers import MODEL
from coordinator.answer import Answer
from coordinator.bench_streams import prompt_ids
from coordinator.chat_model import ChatModel, launch
from coordinator.pacing import Pacing
from coordinator.plan_request import Option, PlanRequest
from coordinator.roofline import MemoryReader
from coordinator.timing import StepRecord
from protocol.client import SamplingParams, TokenPrompt

NUM_STAGES = 2
STREAMS = 8
PROMPT_TOKENS = 16
PARTS = ("streams", "prefill")
GREEDY = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), None, ignore_eos=True, greedy=True)
LEAST_GAIN, MOST_TIME, LEAST_BUSY, LEAST_CHOICE, LEAST_PREFILL = 1.8, 1.1, 0.9, 0.97, 1.7


class Bench:
    """Runs streams and prompts through a launched model."""

    def __init__(self, chat_model: ChatModel) -> None:
        self._chat_model = chat_model
        self._automatic = Pacing(chat_model.engine.settings.max_steps_in_flight)
        self._records: list[StepRecord] = []
        chat_model.engine.observers.append(self._records.append)
        self.busy: list[float] = []

    def tokens_per_s(self, num_streams: int, steps_in_flight: int | None, num_tokens: int) -> float:
        """Decode so many tokens of each stream, behind short prompts; None steps in flight are found automatically."""
        engine = self._chat_model.engine
        most = engine.settings.max_steps_in_flight
        engine.pacing = self._automatic if steps_in_flight is None else Pacing(most, steps_in_flight)
        answers = [self._begin(PROMPT_TOKENS, stream) for stream in range(num_streams)]
        try:
            self._advance(answers, 2 * num_streams)  # all prompts are cached then, and the chain is full
            self._records.clear()
            before, started_s = _num_new(answers), time.monotonic()
            self._advance(answers, before + num_streams * num_tokens)
            ended_s = time.monotonic()
            self.busy = busy_shares(self._records, started_s, ended_s)
            return (_num_new(answers) - before) / (ended_s - started_s)
        finally:
            for answer in answers:
                engine.cancel(answer.sequence)

    @property
    def reason(self) -> str:
        """What was chosen automatically, and why."""
        return self._automatic.reason() or "nothing to choose"

    def prefill_tokens_per_s(self, num_tokens: int, chunk: int) -> float:
        """Feed a prompt in chunks of at most so many tokens, until its first new token."""
        engine = self._chat_model.engine
        engine.settings = replace(engine.settings, prefill_chunk=chunk)
        answer = self._begin(num_tokens, stream=0)
        started_s = time.monotonic()
        try:
            self._advance([answer], 1)
            return num_tokens / (time.monotonic() - started_s)
        finally:
            engine.cancel(answer.sequence)

    def _begin(self, num_tokens: int, stream: int) -> Answer:
        return self._chat_model.begin(TokenPrompt(prompt_ids(self._chat_model.config, num_tokens, stream)), GREEDY)

    def _advance(self, answers: list[Answer], num_new: int) -> None:
        """Step until all answers together have so many new tokens. Raises GenerationError."""
        while _num_new(answers) < num_new:
            self._chat_model.step(answers)
            for answer in answers:
                if answer.sequence.error is not None:
                    raise answer.sequence.error


def _num_new(answers: list[Answer]) -> int:
    return sum(len(answer.sequence.new_ids) for answer in answers)


def busy_shares(records: list[StepRecord], started_s: float, ended_s: float) -> list[float]:
    """Of each stage: how much of the time it was computing (all processes share one host's clock)."""
    shares = []
    for stages in zip(*(record.stages for record in records if record.stages), strict=True):
        spans = [(stage.sent_at_s - stage.compute_s, stage.sent_at_s) for stage in stages]
        inside = (max(0.0, min(end, ended_s) - max(begin, started_s)) for begin, end in spans)
        shares.append(sum(inside) / (ended_s - started_s))
    return shares


@contextmanager
def launched(options: argparse.Namespace) -> Iterator[Bench]:
    """Two stages with a thread each, without drafts and without reuse."""
    int4 = Option("--precision", options.precision)
    request = PlanRequest(
        num_stages=NUM_STAGES,
        num_threads=1,
        kv_budget_tokens=options.prompt + 2048,
        cpu_precision=int4,
        lm_head_precision=int4,
    )
    say(f"{options.precision}: loading {NUM_STAGES} stages")
    with launch(MODEL, request, speculate=False, reuse=False) as chat_model:
        if options.pin:
            for core, join in zip(sorted(os.sched_getaffinity(0)), chat_model.cluster.join(), strict=False):
                os.sched_setaffinity(join.pid, {core})
        yield Bench(chat_model)


def streams(bench: Bench, num_rounds: int, num_tokens: int) -> list[Figure]:
    """All settings in turns; the automatic choice has time to find out first."""
    busy: dict[int, list[list[float]]] = {}

    def run(num_streams: int, steps: int | None) -> float:
        speed = bench.tokens_per_s(num_streams, steps, num_tokens)
        if num_streams == STREAMS and steps is not None and steps >= NUM_STAGES:
            busy.setdefault(steps, []).append(bench.busy)
        return speed

    say("letting the automatic choice find out")
    bench.tokens_per_s(STREAMS, None, 8 * num_tokens)
    say(bench.reason)
    settings = {
        "4 in one": (4, 1),
        **{f"8 in {steps}": (STREAMS, steps) for steps in range(1, NUM_STAGES + 2)},
        "8 automatic": (STREAMS, None),
    }
    say(f"{num_rounds} rounds of {len(settings)} settings")
    speeds = in_turns({name: lambda s=setting: run(*s) for name, setting in settings.items()}, num_rounds)  # type: ignore[misc]
    say(bench.reason)
    return [*stream_figures(speeds, busy), reading_over_one_core(num_rounds)]


def reading_over_one_core(num_rounds: int) -> Figure:
    """What memory gives to as many cores as there are stages, over what it gives to one: where weights set the pace,
    no more steps can be made at once than that."""
    readers, own_threads = (
        {number: MemoryReader(torch.device("cpu")) for number in (1, NUM_STAGES)},
        torch.get_num_threads(),
    )
    try:
        for number in num_rounds * [*readers]:
            torch.set_num_threads(number)
            readers[number].read()
    finally:
        torch.set_num_threads(own_threads)
    one, all_cores = (reader.bandwidth_bytes_per_s for reader in readers.values())
    return Figure(f"memory read by {NUM_STAGES} cores over one", "ratio", (all_cores / one,))


def stream_figures(speeds: dict[str, list[float]], busy: dict[int, list[list[float]]]) -> list[Figure]:
    """From the tokens/s of all settings, and the stages' busy shares by steps in flight, where each can have one."""
    fixed = {name: values for name, values in speeds.items() if name.startswith("8 in")}
    best = [max(values) for values in zip(*fixed.values(), strict=True)]
    best_name = max(fixed, key=lambda name: sum(fixed[name]))
    time_ratio = [2 * four / eight for four, eight in zip(speeds["4 in one"], speeds["8 in 2"], strict=True)]
    return [
        *(Figure(f"{name} steps", "tokens/s", tuple(values)) for name, values in speeds.items()),
        over("8 in two steps over 4 in one, tokens/s", speeds["8 in 2"], speeds["4 in one"], least=LEAST_GAIN),
        Figure("the same, time of a token", "ratio", tuple(time_ratio), most=MOST_TIME),
        *(
            Figure(f"stage {number} busy, 8 in {steps} steps", "share", tuple(shares), least=LEAST_BUSY)
            for steps, rounds in busy.items()
            for number, shares in enumerate(zip(*rounds, strict=True), start=1)
        ),
        over(f"automatic over the best ({best_name})", speeds["8 automatic"], fixed[best_name], least=LEAST_CHOICE),
        over("automatic over the best of each round", speeds["8 automatic"], best),
    ]


def prefill(bench: Bench, num_rounds: int, num_tokens: int, chunk: int) -> list[Figure]:
    """A prompt in chunks, and in one piece."""
    sides = {"chunked": chunk, "whole": num_tokens}
    speeds = in_turns(
        {name: lambda size=size: bench.prefill_tokens_per_s(num_tokens, size) for name, size in sides.items()},  # type: ignore[misc]
        num_rounds,
    )
    return [
        *(Figure(f"prefill of {num_tokens}, {name}", "tokens/s", tuple(values)) for name, values in speeds.items()),
        over(f"chunks of {chunk} over the whole", speeds["chunked"], speeds["whole"], least=LEAST_PREFILL),
    ]


def main() -> None:
    parser = options_parser(__doc__, rounds=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--precision", choices=("int4", "int8", "bf16"), default="int4")
    parser.add_argument("--tokens", type=int, default=6, help="of each stream, in a turn")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--ends-threads", type=int, default=2, help="for lm_head, while no stage waits for a core")
    parser.add_argument("--pin", action="store_true", help="give each stage a core of its own")
    options = parser.parse_args()
    torch.set_num_threads(options.ends_threads)
    figures: list[Figure] = []
    with launched(options) as bench:
        if "streams" in options.parts:
            figures += streams(bench, options.rounds, options.tokens)
        if "prefill" in options.parts:
            figures += prefill(bench, options.rounds, options.prompt, options.chunk)
    publish(figures, options)


if __name__ == "__main__":
    main()
