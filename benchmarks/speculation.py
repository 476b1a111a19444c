"""What drafting gains where an answer repeats its conversation, and costs where it does not: the demo model, in turns.

    python -m benchmarks.speculation [--rounds 7] [--stages 1] [--threads 1] [--json FILE]

Two launches of the demo model, one with drafts and one without (`--no-speculation`), answer the same questions
greedily, one after the other. `repeating`: something is asked in other words that the conversation has already
answered, so that the answer repeats what stands in the prompt. `new`: first questions of conversations, whose answers
repeat nothing. Seconds are those of decoding, prompts not counted; both sides give the same tokens.
"""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from benchmarks.figures import Figure, in_turns, options_parser, over, publish, say
from coordinator.chat_model import ChatModel, launch
from coordinator.plan_request import PlanRequest
from protocol.client import ChatPrompt, ChatTurn, Finished, SamplingParams

REPEATING = (
    ("What is glmpipe?", "what is glmpipe"),
    ("What does a stage worker do?", "What is a stage worker?"),
    ("What is the coordinator?", "What does the coordinator do?"),
    ("What is the KV cache?", "what is a KV cache"),
    ("Count to twenty.", "Count from 1 to 20."),
    ("什么是 glmpipe？", "glmpipe 是什么"),
)
"""A question, and the same one in other words."""
NEW = (
    "Hello!",
    "What precisions are there?",
    "Why ZeroMQ?",
    "What is 7 + 8?",
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "你会做什么？",
    "有哪些精度？",
)
GREEDY = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), 200, ignore_eos=False, greedy=True)
LEAST_GAIN, LEAST_LOSS = 1.5, 0.97

Turns = tuple[ChatTurn, ...]


def answer(chat_model: ChatModel, turns: Turns) -> Finished:
    """The whole answer. Raises GenerationError."""
    *_, finished = chat_model.stream(ChatPrompt(turns), GREEDY)
    assert isinstance(finished, Finished)
    return finished


def repeating_conversations(chat_model: ChatModel) -> list[Turns]:
    """Conversations whose last question was asked and answered before, something else in between."""
    found = []
    for (first, again), (other, _) in zip(REPEATING, REPEATING[1:] + REPEATING[:1], strict=True):
        turns: Turns = ()
        for question in (first, other):
            turns = (*turns, ChatTurn("user", "", question))
            turns = (*turns, ChatTurn("assistant", "", answer(chat_model, turns).text))
        found.append((*turns, ChatTurn("user", "", again)))
    return found


def decode_s(chat_model: ChatModel, conversations: Sequence[Turns]) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds of decoding all answers, and the answers' tokens."""
    answers = [answer(chat_model, turns) for turns in conversations]
    return sum(finished.stats.decode_s for finished in answers), [finished.token_ids for finished in answers]


def compare(
    name: str, sides: dict[str, ChatModel], conversations: Sequence[Turns], options: argparse.Namespace
) -> list[Figure]:
    """Both sides' turns. Raises AssertionError where drafts changed an answer."""
    tokens = {side: decode_s(chat_model, conversations)[1] for side, chat_model in sides.items()}
    assert tokens["with drafts"] == tokens["without"], "drafts changed an answer"
    num_tokens = sum(map(len, tokens["without"]))
    say(f"{name}: {options.rounds} rounds of {num_tokens} tokens in {len(conversations)} answers")
    seconds = in_turns(
        {side: lambda model=chat_model: decode_s(model, conversations)[0] for side, chat_model in sides.items()},  # type: ignore[misc]
        options.rounds,
    )
    least = LEAST_GAIN if name == "repeating" else LEAST_LOSS
    return [
        *(
            Figure(f"{name}, {side}", "tokens/s", tuple(num_tokens / s for s in values))
            for side, values in seconds.items()
        ),
        over(f"{name}: with drafts over without", seconds["without"], seconds["with drafts"], least=least),
    ]


def main() -> None:
    parser = options_parser(__doc__, rounds=7)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    request = PlanRequest(num_stages=options.stages, num_threads=options.threads)
    with ExitStack() as stack:
        sides = {
            "with drafts": stack.enter_context(launch(None, request)),
            "without": stack.enter_context(launch(None, request, speculate=False)),
        }
        news = [(ChatTurn("user", "", question),) for question in NEW]
        figures = compare("repeating", sides, repeating_conversations(sides["without"]), options)
        figures += compare("new", sides, news, options)
    publish(figures, options)


if __name__ == "__main__":
    main()
