"""What cutting a model over worker processes costs one sequence: a token's time beside the undivided model's.

    python -m benchmarks.pipeline_cost [--workers 2 4] [--tokens 12] [--rounds 8] [--threads 2] [--json FILE]

The ChatGLM2-6B shape with random weights in int4, both ends too. The undivided model is computed in this process,
without any of the programs; the cut one by workers, the coordinator in this process, as a chat has it. Both decode
behind the same prompt with the same threads, and take turns of a few tokens; the one whose turn it is not sleeps. A
round's figure is the median of its turns'.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.figures import Figure, in_turns, options_parser, over, publish, say
from benchmarks.peers import MODEL, SINGLE, ours
from coordinator.answer import Answer
from coordinator.bench_streams import prompt_ids
from coordinator.chat_model import ChatModel
from coordinator.timing import StepRecord
from glm.attention import Segment
from glm.config import load_config
from glm.model import Model
from glm.model_source import open_checkpoint
from glm.precision import Precision
from protocol.client import SamplingParams, TokenPrompt

LEAST_SPEED = 0.97
TURN_TOKENS = 4
"""The last one of a turn is not overlapped with the step behind it, which would be made in the other one's turn."""
GREEDY = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), None, ignore_eos=True, greedy=True)


class Undivided:
    """The whole model in this process, decoding greedily behind a prompt."""

    def __init__(self, precision: str, prompt: tuple[int, ...]) -> None:
        path = Path(MODEL)
        self._model = Model.load(open_checkpoint(path), load_config(path), Precision(precision))
        self._cache = self._model.layers.new_cache()
        self._prompt = prompt

    def begin(self) -> None:
        """Feed the prompt; what was decoded before is forgotten."""
        self._cache.truncate(0)
        self.last_id = self._next(self._prompt)

    def turn(self) -> float:
        """Decode some; the seconds of one."""
        started_s = time.perf_counter()
        for _ in range(TURN_TOKENS):
            self.last_id = self._next((self.last_id,))
        return (time.perf_counter() - started_s) / TURN_TOKENS

    def _next(self, ids: tuple[int, ...]) -> int:
        hidden = self._model.embedding.forward(torch.tensor(ids))
        hidden = self._model.layers.forward(hidden, [Segment(self._cache, self._cache.length, len(ids))])
        return int(self._model.head.forward(hidden[-1:]).argmax())


class Divided:
    """The same over workers."""

    def __init__(self, chat_model: ChatModel, prompt: tuple[int, ...]) -> None:
        self._chat_model = chat_model
        self._answer: Answer = chat_model.begin(TokenPrompt(prompt), GREEDY)
        self._advance(1)
        self.records: list[StepRecord] = []
        chat_model.engine.observers.append(self.records.append)

    @property
    def last_id(self) -> int:
        """The token decoded last."""
        return self._answer.sequence.new_ids[-1]

    def turn(self) -> float:
        """Decode some; the seconds of one, text and bookkeeping included."""
        started_s = time.perf_counter()
        self._advance(TURN_TOKENS)
        return (time.perf_counter() - started_s) / TURN_TOKENS

    def parts_s(self) -> tuple[float, float, float]:
        """Median seconds of all stages computing, of the ends, and on the way, of the tokens decoded so far."""
        stages = [sum(stage.compute_s for stage in record.stages) for record in self.records]
        ends = [sum(lap.ended_at_s - lap.started_at_s for lap in record.ends) for record in self.records]
        under_way = [record.arrived_at_s - record.submitted_at_s for record in self.records]
        wires = [whole - inside for whole, inside in zip(under_way, stages, strict=True)]
        return statistics.median(stages), statistics.median(ends), statistics.median(wires)

    def _advance(self, num_tokens: int) -> None:
        """Step until there are so many more ids, and nothing is on its way. Raises GenerationError."""
        engine, sequence = self._chat_model.engine, self._answer.sequence
        wanted = len(sequence.new_ids) + num_tokens
        engine.holds_answers = False
        while len(sequence.new_ids) < wanted:
            if len(sequence.new_ids) == wanted - 1 and engine.load().steps_in_flight:
                engine.holds_answers = True
            self._chat_model.step([self._answer])
            if sequence.error is not None:
                raise sequence.error
        engine.holds_answers = True


def compare(undivided: Undivided, divided: Divided, num_tokens: int) -> tuple[float, float]:
    """Median seconds of a token, of either, in turns."""
    taken = in_turns({"undivided": undivided.turn, "divided": divided.turn}, -(-num_tokens // TURN_TOKENS))
    return statistics.median(taken["undivided"]), statistics.median(taken["divided"])


def figures(num_workers: int, rounds: list[tuple[float, float]]) -> list[Figure]:
    """Of one number of workers."""
    alone, cut = zip(*rounds, strict=True)
    return [
        Figure(f"a token, undivided (beside {num_workers} workers)", "ms", tuple(1e3 * s for s in alone)),
        Figure(f"a token, {num_workers} workers", "ms", tuple(1e3 * s for s in cut)),
        over(f"speed over {num_workers} workers, of the undivided model's", alone, cut, least=LEAST_SPEED),
    ]


def run(options: argparse.Namespace) -> list[Figure]:
    """All rounds for all numbers of workers."""
    prompt = prompt_ids(load_config(Path(MODEL)), SINGLE.num_prompt_tokens, stream=0)
    say(f"{options.precision}: loading the undivided model")
    undivided = Undivided(options.precision, prompt)
    found = []
    for num_workers in options.workers:
        with ours(options.precision, options.threads, num_workers, [SINGLE]) as chat_model:
            undivided.begin()
            divided = Divided(chat_model, prompt)
            one_round: Callable[[], tuple[float, float]] = partial(compare, undivided, divided, options.tokens)
            one_round()
            found += figures(num_workers, [one_round() for _ in range(options.rounds)])
            for name, seconds in zip(("in the stages", "in both ends", "on the way"), divided.parts_s(), strict=True):
                found.append(Figure(f"of it {name}, {num_workers} workers", "ms", (1e3 * seconds,)))
    return found


def main() -> None:
    parser = options_parser(__doc__, rounds=8)
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--precision", choices=("int4", "int8", "bf16"), default="int4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    publish(run(options), options)


if __name__ == "__main__":
    main()
