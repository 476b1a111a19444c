"""What each precision, and each way of quantising, costs in quality: perplexity, logits, the fixed questions.

    python -m benchmarks.quality [--model DIR] [--conversations 400] [--seed 20] [--schemes int4]

The text held out: conversations from the demo model's corpus generator (`scripts/demo_corpus.py`), with a seed that
neither the training nor the tokenizer used (those had 1 to 5). Perplexity is that of the answers in it, and errors are
absolute differences of logits from fp32 where the answers' tokens are predicted. Prints a Markdown table;
docs/measurements.md keeps one.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch.nn.functional import cross_entropy

from glm.attention import Segment
from glm.checkpoint import Checkpoint, TensorSource
from glm.config import ModelConfig, load_config
from glm.demo import demo_model_dir
from glm.ends import Embedding, Head, end_placement
from glm.layout import layer_sources, lm_head_source
from glm.model import LayerStack, Model
from glm.precision import Precision
from glm.quantization import INT4_GROUP_SIZE, INT4_LEVELS, int4_scales, round_to_scale

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from demo_corpus import conversations  # noqa: E402
from train_demo import IGNORED, LONG, Example, Schedule, Turn, example, greedy_answer  # noqa: E402

SEED = 20
GROUP_SIZES = (16, 32, 64, 128)
QUESTIONS = ROOT / "tests/end_to_end/demo_questions.json"
CPU = torch.device("cpu")

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""A weight [rows, columns] in fp32 -> the weight that is computed with instead."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers' linears and lm_head are held: at a precision of glmpipe's, or rounded in another way.

    `bits` is the size of a weight of the layers, its share of a scale included.
    """

    layers: str
    head: str
    bits: float
    hold_layers: Precision | Rounding
    hold_head: Precision | Rounding


def exactly(weight: torch.Tensor) -> torch.Tensor:
    """Not rounded at all."""
    return weight


def per_row(bits: int) -> Rounding:
    """As the published quantised models are: one scale a row, the largest magnitude over 7 (or 127)."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        scales = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (weight / scales).round() * scales

    return rounded


def in_groups(group: int, levels: Sequence[float] = INT4_LEVELS) -> Rounding:
    """As glmpipe's int4, with groups of any size (a row that it does not divide has groups of half of it)."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        size = group if weight.shape[1] % group == 0 else group // 2
        grouped = weight.view(weight.shape[0], -1, size)
        scales = int4_scales(grouped, levels)
        return (round_to_scale(grouped, scales, bits=4) * scales.unsqueeze(-1)).view_as(weight)

    return rounded


def with_offset(group: int) -> Rounding:
    """Sixteen equal steps from a group's smallest value to its largest: two numbers a group, both fp16."""

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        grouped = weight.view(weight.shape[0], -1, group)
        low = grouped.amin(-1, keepdim=True).half().float()
        scales = ((grouped.amax(-1, keepdim=True) - low) / 15).half().float()
        return (((grouped - low) / scales).round().clamp(0, 15) * scales + low).view_as(weight)

    return rounded


def schemes() -> list[Scheme]:
    """What is held against fp32."""
    fp32, int8, int4 = Precision.FP32, Precision.INT8, Precision.INT4
    found = [Scheme(p.value, p.value, p.bits, p, p) for p in (Precision.BF16, Precision.FP16)]
    found += [Scheme("int8", head.value, 8, int8, head) for head in (fp32, int8, int4)]
    bits = 4 + 16 / INT4_GROUP_SIZE
    found += [Scheme(f"int4, groups of {INT4_GROUP_SIZE}", h.value, bits, int4, h) for h in (fp32, int8, int4)]
    found += [
        Scheme(f"int4, groups of {group}, rounded", "fp32", 4 + 16 / group, in_groups(group), exactly)
        for group in GROUP_SIZES
    ]
    sixty = [level / 10 for level in range(70, 131)]
    found.append(Scheme("int4, groups of 32, 61 candidates", "fp32", 4.5, in_groups(32, sixty), exactly))
    found.append(Scheme("int4, groups of 32, with an offset", "fp32", 5, with_offset(32), exactly))
    found.append(Scheme("int8, a scale a row, as published", "fp32", 8, per_row(8), exactly))
    found.append(Scheme("int4, a scale a row, as published", "fp32", 4, per_row(4), exactly))
    return found


class RoundedSource:
    """A checkpoint whose matrices have been rounded by name; everything else is as it was."""

    def __init__(self, source: TensorSource, roundings: Mapping[str, Rounding]) -> None:
        self.model_dir = source.model_dir
        self._source = source
        self._roundings = roundings

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._source.read(shapes):
            rounding = self._roundings.get(name)
            yield name, tensor if rounding is None else rounding(tensor.to(torch.float32))

    def fingerprint(self) -> str:
        return self._source.fingerprint()


def model_of(scheme: Scheme, checkpoint: TensorSource, config: ModelConfig) -> Model:
    """The whole model held like this; rounded weights compute in fp32."""
    layers, head, roundings = scheme.hold_layers, scheme.hold_head, dict[str, Rounding]()
    if not isinstance(layers, Precision):
        for layer in range(config.num_layers):
            sources = layer_sources(config, layer).values()
            roundings |= {name: layers for s in sources for name, shape in s.shapes.items() if len(shape) == 2}
        layers = Precision.FP32
    if not isinstance(head, Precision):
        roundings |= dict.fromkeys(lm_head_source(config).names, head)
        head = Precision.FP32
    source = RoundedSource(checkpoint, roundings)
    plain = layers if not layers.is_quantized else Precision.FP32
    embedding = Embedding.load(checkpoint, config, end_placement(plain, CPU, config))
    stack = LayerStack.load(source, config, 0, config.num_layers, layers, CPU)
    norm, lm_head = (end_placement(p, CPU, config) for p in (plain, head))
    return Model(embedding, stack, Head.load(source, config, norm, lm_head))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Conversations that no training saw, as the model reads them."""

    tokenizer: Any
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Quality:
    """What a model gives for the held-out answers, beside what the reference gives.

    `perplexity` of the answers' tokens; `mean_error` and `max_error` of all logits where these are predicted;
    `agreement`: the share of those places where the most likely token is the same.
    """

    perplexity: float
    mean_error: float
    max_error: float
    agreement: float


def held_out(model_dir: Path, seed: int, num_conversations: int) -> HeldOut:
    """Conversations of a seed, as the model in `model_dir` reads them."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    chosen = conversations(seed, num_conversations)
    return HeldOut(tokenizer, tuple(example(tokenizer, turns) for turns in chosen))


def share_unseen(seed: int, num_conversations: int) -> float:
    """The share of the questions of these conversations that are, letter for letter, in no training conversation."""
    seen = {
        turn.question
        for schedule in (Schedule(), LONG)
        for turns in conversations(schedule.seed, schedule.num_conversations)
        for turn in turns
    }
    asked = [turn.question for turns in conversations(seed, num_conversations) for turn in turns]
    return sum(question not in seen for question in asked) / len(asked)


@torch.inference_mode()
def answer_logits(model: Model, one: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [n, vocab], ids that are wanted there [n]) of the answers in an example."""
    hidden = model.embedding.forward(torch.tensor(one.token_ids))
    segment = Segment(model.layers.new_cache(), 0, len(one.token_ids), None)
    hidden = model.layers.forward(hidden, [segment])
    targets = torch.tensor(one.targets)
    wanted = targets != IGNORED
    return model.head.forward(hidden[wanted]), targets[wanted]


def measure(model: Model, reference: Model, text: HeldOut) -> Quality:
    """Hold a model against the reference."""
    loss, error_sum, max_error, num_same, num_tokens, num_logits = 0.0, 0.0, 0.0, 0, 0, 0
    for one in text.examples:
        (logits, wanted), (right, _) = answer_logits(model, one), answer_logits(reference, one)
        error = (logits - right).abs()
        loss += float(cross_entropy(logits, wanted, reduction="sum"))
        error_sum, max_error = error_sum + float(error.sum()), max(max_error, float(error.max()))
        num_same += int((logits.argmax(1) == right.argmax(1)).sum())
        num_tokens, num_logits = num_tokens + len(wanted), num_logits + logits.numel()
    return Quality(math.exp(loss / num_tokens), error_sum / num_logits, max_error, num_same / num_tokens)


def num_right(model: Model, tokenizer: Any) -> tuple[int, int]:
    """How many of the fixed questions are answered rightly, and how many there are."""
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    right = 0
    for question in questions:
        turns: list[Turn] = []
        for query in question["turns"]:
            turns.append(Turn(query, greedy_answer(model, tokenizer, [*turns, Turn(query, "")])))
        right += question["expect"] in turns[-1].answer
    return right, len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--schemes", default="", help="only those whose name has this in it")
    options = parser.parse_args()
    text = held_out(options.model, options.seed, options.conversations)
    num_tokens = sum(target != IGNORED for one in text.examples for target in one.targets)
    unseen = share_unseen(options.seed, options.conversations)
    print(f"{len(text.examples)} conversations, {num_tokens} tokens of answers; {unseen:.0%} of the questions unseen\n")
    config, checkpoint = load_config(options.model), Checkpoint(options.model)
    exact = Scheme("fp32", "fp32", 32, Precision.FP32, Precision.FP32)
    reference = model_of(exact, checkpoint, config)
    base = measure(reference, reference, text).perplexity
    print("| layers | lm_head | bits a weight | perplexity | rise | mean error | max error | same choice | right |")
    print("| --- |" + " --- |" * 8)
    for scheme in (s for s in (exact, *schemes()) if options.schemes in s.layers):
        model = model_of(scheme, checkpoint, config)
        found = measure(model, reference, text)
        right, asked = num_right(model, text.tokenizer)
        print(
            f"| {scheme.layers} | {scheme.head} | {scheme.bits:.2f} | {found.perplexity:.4f} "
            f"| {found.perplexity / base - 1:.2%} | {found.mean_error:.3f} | {found.max_error:.2f} "
            f"| {found.agreement:.2%} | {right} of {asked} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
