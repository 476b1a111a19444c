"""What each precision, and each way of quantising, costs in quality: perplexity, logits, the fixed questions.

    python -m benchmarks.quality [--model DIR] [--conversations 400] [--seed 20] [--schemes int4]

Perplexity is that of the answers in conversations from the demo model's corpus generator (`scripts/demo_corpus.py`)
with a seed that neither its training nor its tokenizer used (those had 1 to 5). Errors of logits are absolute
differences from fp32, at the positions that predict an answer's tokens. Prints a Markdown table; docs/measurements.md
keeps one.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

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
from train_demo import IGNORED, Example, Turn, example, greedy_answer  # noqa: E402

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


def schemes() -> list[Scheme]:
    """The rows of the table; the first is what the others are held against."""
    fp32, bf16, int8, int4 = Precision.FP32, Precision.BF16, Precision.INT8, Precision.INT4
    found = [Scheme(p.value, p.value, p.bits, p, p) for p in (fp32, bf16, Precision.FP16)]
    found += [Scheme("int8", head.value, 8, int8, head) for head in (fp32, int8, int4)]
    bits = 4 + 16 / INT4_GROUP_SIZE
    found += [Scheme(f"int4, groups of {INT4_GROUP_SIZE}", h.value, bits, int4, h) for h in (fp32, int8, int4)]
    found += [
        Scheme(f"int4, groups of {group}, rounded", "fp32", 4 + 16 / group, in_groups(group), exactly)
        for group in GROUP_SIZES
    ]
    found.append(Scheme("int8, a scale a row (published)", "fp32", 8, per_row(8), exactly))
    found.append(Scheme("int4, a scale a row (published)", "fp32", 4, per_row(4), exactly))
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


@torch.inference_mode()
def answer_logits(model: Model, examples: Sequence[Example]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits [n, vocab], ids that were wanted there [n]) of the answers in each example."""
    for one in examples:
        hidden = model.embedding.forward(torch.tensor(one.token_ids))
        hidden = model.layers.forward(hidden, [Segment(model.layers.new_cache(), 0, len(one.token_ids), None)])
        targets = torch.tensor(one.targets)
        wanted = targets != IGNORED
        yield model.head.forward(hidden[wanted]), targets[wanted]


def num_right(model: Model, tokenizer: object) -> tuple[int, int]:
    """How many of the fixed questions are answered rightly, and how many there are."""
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    right = 0
    for question in questions:
        turns: list[Turn] = []
        for query in question["turns"]:
            answer = greedy_answer(model, tokenizer, [*turns, Turn(query, "")])
            turns.append(Turn(query, answer))
        right += question["expect"] in turns[-1].answer
    return right, len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_dir())
    parser.add_argument("--conversations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--schemes", default="", help="only those whose name has this in it")
    options = parser.parse_args()
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(options.model / "tokenizer.model"))
    examples = [example(tokenizer, turns) for turns in conversations(options.seed, options.conversations)]
    config, checkpoint = load_config(options.model), Checkpoint(options.model)
    reference: list[torch.Tensor] = []
    reference_nll = 0.0
    print("| layers | lm_head | bits a weight | perplexity | rise | mean error | max error | right |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, scheme in enumerate(schemes()):
        if number and options.schemes not in scheme.layers:
            continue
        model = model_of(scheme, checkpoint, config)
        nll, count, errors, worst, numel = 0.0, 0, 0.0, 0.0, 0
        for index, (logits, wanted) in enumerate(answer_logits(model, examples)):
            nll += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            count += len(wanted)
            if number == 0:
                reference.append(logits)
            error = (logits - reference[index]).abs()
            errors, worst, numel = errors + float(error.sum()), max(worst, float(error.max())), numel + error.numel()
        nll /= count
        if number == 0:
            reference_nll = nll
        rise = torch.tensor(nll - reference_nll).expm1() * 100
        right, asked = num_right(model, tokenizer)
        print(
            f"| {scheme.layers} | {scheme.head} | {scheme.bits:.2f} | {torch.tensor(nll).exp():.4f} | {rise:.2f} % | "
            f"{errors / numel:.3f} | {worst:.2f} | {right} of {asked} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
