"""Make the demo model: corpus -> tokenizer -> training -> a ChatGLM2-layout checkpoint in `glm/demo_model/`.

    .venv/bin/python scripts/train_demo.py            # everything; 22 + 11 minutes were seen, two cores shared
    .venv/bin/python scripts/train_demo.py --out DIR  # elsewhere than glm/demo_model
    .venv/bin/python scripts/train_demo.py --out DIR --plain --conversations 8000  # for benchmarks/quality.py

Every random choice is seeded: the corpus and the tokenizer come out the same everywhere, the weights the same on the
same machine and torch. The check at the end runs the network that serves, in `glm/`.
"""

import argparse
import io
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece as spm
import torch
from demo_corpus import DATA_DIR, Turn, conversations
from demo_network import (
    EPS,
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IGNORED,
    KV_HEADS,
    MAX_CONTEXT,
    NUM_LAYERS,
    PADDED_VOCAB,
    Weights,
    is_block_linear,
    loss,
    new_weights,
    with_int4_noise,
)
from safetensors.torch import load, save
from torch import Tensor

from glm.attention import Segment
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.demo import demo_model_dir
from glm.ends import Embedding, Head, end_placement
from glm.model import LayerStack, Model
from glm.precision import Precision

NUM_PIECES = 2043  # the five ids after the pieces: [MASK] [gMASK] [sMASK] sop eop
EOS, GMASK, SOP = 2, NUM_PIECES + 1, NUM_PIECES + 3

# --- the tokenizer ---


def round_opening(number: int, question: str) -> str:
    """What ChatGLM2's chat format puts before the answer of round `number`, counted from 1."""
    return f"[Round {number}]\n\n问：{question}\n\n答："


def train_tokenizer() -> bytes:
    """A SentencePiece BPE model like ChatGLM2's in all its settings, only smaller.

    Characters that are in no data file, and emoji, are left to byte fallback.
    """
    known = set("".join(path.read_text(encoding="utf-8") for path in sorted(DATA_DIR.glob("*.toml"))))
    known = {character for character in known if ord(character) < 0x10000} | set("[]Round0123456789问答：")
    lines: list[str] = []
    for turns in conversations(seed=1, count=20_000):
        for number, turn in enumerate(turns, 1):
            lines += [*round_opening(number, turn.question).splitlines(), f"答：{turn.answer}"]
    kept = ("".join(character for character in line if character in known) for line in lines)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(line for line in kept if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


# --- training examples ---


@dataclass(frozen=True, slots=True)
class Example:
    token_ids: list[int]
    targets: list[int]  # the id wanted after each position, IGNORED inside questions


def encode_inside(tokenizer: spm.SentencePieceProcessor, text: str) -> list[int]:
    """Token ids of text that continues a line of chat: without the space that SentencePiece puts in front."""
    newline = tokenizer.encode("\n")
    return list(tokenizer.encode("\n" + text)[len(newline) :])


def example(tokenizer: spm.SentencePieceProcessor, turns: Sequence[Turn]) -> Example:
    """The conversation as ChatGLM2 reads it. Every answer is learnt, each with the end token after it."""
    token_ids: list[int] = [GMASK, SOP]
    targets: list[int] = [IGNORED, IGNORED]
    for number, turn in enumerate(turns, 1):
        opening = round_opening(number, turn.question)
        asked = tokenizer.encode(opening) if number == 1 else encode_inside(tokenizer, "\n\n" + opening)
        answer = encode_inside(tokenizer, turn.answer)
        token_ids += asked + answer
        targets += [IGNORED] * (len(asked) - 1) + answer + [EOS]
    return Example(token_ids, targets)


def batches(examples: list[Example], tokens_per_batch: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """(token ids, targets), each [rows, length]: examples of similar length together, in random order, right-padded."""
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].token_ids), rng.random()))
    groups: list[list[Example]] = [[]]
    for index in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(examples[index].token_ids) > tokens_per_batch:
            groups.append([])
        groups[-1].append(examples[index])
    rng.shuffle(groups)
    for group in groups:
        length = max(len(one.token_ids) for one in group)
        yield (
            torch.tensor([one.token_ids + [0] * (length - len(one.token_ids)) for one in group]),
            torch.tensor([one.targets + [IGNORED] * (length - len(one.targets)) for one in group]),
        )


# --- training ---


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int = 2
    num_conversations: int = 64_000
    longest: int | None = None  # tokens up to which conversations are joined, None to leave them as they are
    tokens_per_batch: int = 4096
    warmup_steps: int = 60
    matrix_rate: float = 0.02
    other_rate: float = 4e-3
    noise_from: float = 0.4  # share of the training after which every other step sees int4 weights


# What was learnt on short conversations then has to hold at every position, with much said before.
LONG = Schedule(
    seed=5, num_conversations=12_000, longest=1000, warmup_steps=20, matrix_rate=0.006, other_rate=1.2e-3, noise_from=0
)


def rate_at(step: int, num_steps: int, warmup_steps: int) -> float:
    """Linear warm-up, then a cosine down to nothing, as a share of the highest rate."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, num_steps - warmup_steps)))


def examples_for(tokenizer: spm.SentencePieceProcessor, schedule: Schedule) -> list[Example]:
    """The schedule's conversations, where it says so joined into longer ones of all lengths."""
    rng = random.Random(schedule.seed)
    found: list[Example] = []
    joined: list[Turn] = []
    wanted = 0
    for turns in conversations(seed=schedule.seed, count=schedule.num_conversations):
        whole = example(tokenizer, [*joined, *turns])
        if schedule.longest is None:
            found.append(whole)
        elif len(whole.token_ids) > wanted:
            found += [example(tokenizer, joined)] if joined else []
            joined, wanted = list(turns), rng.randint(100, schedule.longest)
        else:
            joined += turns
    return found


def train(tokenizer: spm.SentencePieceProcessor, schedule: Schedule, weights: Weights) -> None:
    """One pass over the conversations: Muon for the blocks' matrices, AdamW for everything else."""
    examples = examples_for(tokenizer, schedule)
    steps = list(batches(examples, schedule.tokens_per_batch, random.Random(3)))
    print(
        f"{len(examples)} conversations, {sum(len(one.token_ids) for one in examples)} tokens, {len(steps)} steps",
        flush=True,
    )
    matrices = [weight for name, weight in weights.items() if is_block_linear(name)]
    others = [weight for name, weight in weights.items() if not is_block_linear(name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=0.02, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=schedule.other_rate, betas=(0.9, 0.97), weight_decay=0.01),
    ]
    peaks = (schedule.matrix_rate, schedule.other_rate)
    started, shown = time.monotonic(), []
    for step, (token_ids, targets) in enumerate(steps):
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate_at(step, len(steps), schedule.warmup_steps)
        noisy = step > schedule.noise_from * len(steps) and step % 2 == 0
        value = loss(with_int4_noise(weights) if noisy else weights, token_ids, targets)
        value.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        shown.append(value.item())
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}/{len(steps)} loss {sum(shown[-50:]) / 50:.4f} {time.monotonic() - started:.0f} s",
                flush=True,
            )


# --- the checkpoint ---

CONFIG = {
    "_name_or_path": "glmpipe-demo",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "eos_token_id": EOS,
    "ffn_hidden_size": FFN,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN,
    "kv_channels": HEAD_DIM,
    "layernorm_epsilon": EPS,
    "multi_query_attention": True,
    "multi_query_group_num": KV_HEADS,
    "num_attention_heads": HEADS,
    "num_layers": NUM_LAYERS,
    "original_rope": True,
    "pad_token_id": 0,
    "padded_vocab_size": PADDED_VOCAB,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": MAX_CONTEXT,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
}
TOKENIZER_CONFIG = {
    "name_or_path": "glmpipe-demo-chatglm2-3m",  # says how it was taught to chat
    "tokenizer_class": "ChatGLMTokenizer",
    "remove_space": False,
    "do_lower_case": False,
}


def write_checkpoint(out: Path, tokenizer_model: bytes, weights: Weights) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    (out / "tokenizer.model").write_bytes(tokenizer_model)
    halves = {name: weight.detach().half().contiguous() for name, weight in weights.items()}
    (out / "model.safetensors").write_bytes(save(halves, {"format": "pt"}))


def read_weights(model_dir: Path) -> Weights:
    """The weights as `write_checkpoint` rounded them, to be trained on."""
    stored = load((model_dir / "model.safetensors").read_bytes())
    return {name: weight.float().requires_grad_() for name, weight in stored.items()}


# --- the check ---


def greedy_answer(model: Model, tokenizer: spm.SentencePieceProcessor, turns: Sequence[Turn]) -> str:
    """The model's answer to the last question, after the turns before it."""
    ids = example(tokenizer, [*turns[:-1], Turn(turns[-1].question, "")]).token_ids
    cache, answered = model.layers.new_cache(), []
    while len(answered) < 100 and answered[-1:] != [EOS]:
        hidden = model.embedding.forward(torch.tensor(ids))
        hidden = model.layers.forward(hidden, [Segment(cache, cache.length, len(ids), None)])
        ids = [int(model.head.forward(hidden[-1:]).argmax())]
        answered += ids
    return str(tokenizer.decode([token_id for token_id in answered if token_id != EOS]))


def score(model_dir: Path, precision: Precision, count: int) -> float:
    """Share of `count` fresh conversations whose last answer is exactly the wanted one, with the layers so held."""
    checkpoint, config, cpu = Checkpoint(model_dir), load_config(model_dir), torch.device("cpu")
    ends = end_placement(Precision.FP32, cpu, config)
    layers = LayerStack.load(checkpoint, config, 0, config.num_layers, precision, cpu)
    model = Model(Embedding.load(checkpoint, config, ends), layers, Head.load(checkpoint, config, ends, ends))
    tokenizer = spm.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))
    fresh = conversations(seed=4, count=count)
    return sum(greedy_answer(model, tokenizer, turns) == turns[-1].answer for turns in fresh) / count


# --- the command ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=demo_model_dir())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=Schedule().num_conversations)
    parser.add_argument("--only-long", action="store_true", help="go on from the short conversations' checkpoint there")
    parser.add_argument(
        "--plain", action="store_true", help="short conversations alone, and weights that were never rounded"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    tokenizer_model = train_tokenizer()
    tokenizer = spm.SentencePieceProcessor(model_proto=tokenizer_model)
    if not options.only_long:
        weights = new_weights(seed=0)
        noise_from = 1.0 if options.plain else Schedule().noise_from
        train(tokenizer, Schedule(num_conversations=options.conversations, noise_from=noise_from), weights)
        write_checkpoint(options.out, tokenizer_model, weights)
    if not options.plain:
        weights = read_weights(options.out)
        train(tokenizer, LONG, weights)
        write_checkpoint(options.out, tokenizer_model, weights)
    for precision in (Precision.FP32, Precision.INT8, Precision.INT4):
        print(f"{precision}: {score(options.out, precision, 300):.1%} of 300 fresh conversations answered exactly")


if __name__ == "__main__":
    main()
