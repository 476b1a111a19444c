"""What a long queue costs those that are served: thousands of requests at once beside 256, in turns, in one launch.

    python -m benchmarks.queue_length [--lengths 256 1000 4000] [--rounds 3] [--tokens 32] [--json FILE]

The demo model over two stages, and the service of a launch; the clients' ends are lists in this process, so that the
cost is the launch's alone. Each setting runs until everybody is answered.
"""

import argparse
import itertools
import time

import torch

from benchmarks.figures import Figure, in_turns, options_parser, over, publish, say
from coordinator.chat_model import ChatModel, launch
from coordinator.plan_request import PlanRequest
from coordinator.service import Service
from protocol.client import Generate, SamplingParams, TokenPrompt
from protocol.wire import encode

LENGTHS = [256, 1000, 4000]
LEAST = 0.95
PROMPT_TOKENS = 12
CLIENT = b"client"


class ListRouter:
    """Has the calls of a ROUTER that a service makes: what it hears is given, what it says is only counted."""

    def __init__(self, messages: list[list[bytes]]) -> None:
        self._messages = iter(messages)
        self._next = next(self._messages, None)
        self.num_sent = 0

    def poll(self, _timeout_ms: int) -> bool:
        return self._next is not None

    def recv_multipart(self) -> list[bytes]:
        assert self._next is not None
        message, self._next = self._next, next(self._messages, None)
        return message

    def send_multipart(self, _frames: list[bytes], flags: int) -> None:
        del flags
        self.num_sent += 1


def tokens_per_s(chat_model: ChatModel, length: int, num_tokens: int, first: int) -> float:
    """So many requests at once, of so many new tokens each; prompts begin with numbers from `first` on."""
    sampling = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), num_tokens, ignore_eos=True, greedy=True)
    vocab_size = chat_model.config.vocab_size
    messages = []
    for number in range(first, first + length):
        ids = tuple((number // vocab_size**place + 31 * place) % vocab_size for place in range(PROMPT_TOKENS))
        messages.append([CLIENT, *map(bytes, encode(Generate(number, TokenPrompt(ids), sampling)))])
    chat_model.engine.forget_prefixes()
    router = ListRouter(messages)
    with Service(chat_model, router) as service:  # type: ignore[arg-type]
        started_s = time.monotonic()
        service.run(lambda: not router.poll(0) and chat_model.engine.is_idle)
        return length * num_tokens / (time.monotonic() - started_s)


def main() -> None:
    parser = options_parser(__doc__, rounds=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    options: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    numbers = itertools.count()
    with launch(None, PlanRequest(num_stages=2, num_threads=1)) as chat_model:

        def run(length: int) -> float:
            speed = tokens_per_s(chat_model, length, options.tokens, next(numbers) * max(options.lengths))
            say(f"{length} at once: {speed:.0f} tokens/s")
            return speed

        run(options.lengths[0])
        sides = {str(length): lambda length=length: run(length) for length in options.lengths}  # type: ignore[misc]
        speeds = in_turns(sides, options.rounds)
    shortest, *longer = speeds
    publish(
        [
            *(Figure(f"{name} requests at once", "tokens/s", tuple(values)) for name, values in speeds.items()),
            *(over(f"{name} over {shortest}", speeds[name], speeds[shortest], least=LEAST) for name in longer),
        ],
        options,
    )


if __name__ == "__main__":
    main()
