"""Small tokenizers of every kind, trained on the spot, so that their properties can be tested anywhere."""

import base64
import json
from pathlib import Path

import sentencepiece
import tokenizers

from glm.config import ModelConfig
from glm.sentencepiece_tokenizer import LONGEST_BLANK
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

TEXTS = [
    "Hello, world! This is a small text about pipelines, stages and workers.",
    "你好，世界！今天天气怎么样？我想去公园散步。",
    "def main():\n    print('hello world')  # 1234567890",
    "The quick brown fox jumps over the lazy dog; 敏捷的棕色狐狸跳过了懒狗。",
    "GLM 是一个语言模型，支持中英双语的对话。",
] * 4

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
SPECIAL = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES)


def tiny_config(family: str, **changes: object) -> ModelConfig:
    """A config for which only what tokenizers look at is meant seriously; a `name` is one that config.json says."""
    facts: dict[str, object] = {
        "family": family,
        "name": "tiny",
        "num_layers": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "ffn_size": 8,
        "vocab_size": 4096,
        "max_context": 512,
        "norm_eps": 1e-5,
        "rotary_dim": 4,
        "rotary_base": 10000.0,
        "stored_dtype": "float32",
        "eos_ids": (2,),
        "pad_id": 0,
        "published_name": changes.get("name", ""),
    }
    return ModelConfig(**{**facts, **changes})  # type: ignore[arg-type]


def train_chatglm(model_dir: Path, **settings: object) -> None:
    """ChatGLM-6B's kind: unigram, NFKC, white space symbols, special pieces, bytes at the end."""
    blanks = [f"<|blank_{length}|>" for length in range(2, LONGEST_BLANK + 1)]
    _train(
        model_dir / "ice_text.model",
        model_type="unigram",
        vocab_size=600,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<n>", "<|tab|>", *blanks],
        control_symbols=["<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>"],
    )
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))


def train_chatglm2(model_dir: Path) -> None:
    """ChatGLM2-6B's kind: BPE, text as it is, bytes after the three first ids."""
    _train(
        model_dir / "tokenizer.model",
        model_type="bpe",
        vocab_size=500,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def _train(path: Path, **options: object) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS),
            model_writer=file,
            byte_fallback=True,
            split_digits=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )


def write_glm4(model_dir: Path, num_extra: int = 44) -> int:
    """GLM-4's kind: 256 bytes and some merges in tiktoken's text format; returns the number of ranks."""
    pieces = [bytes([byte]) for byte in range(256)]
    for text in ("你好", "hello", "世界", " world", "，", "\n\n"):
        data = text.encode()
        pieces += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in pieces]
    pieces = list(dict.fromkeys(pieces))[: 256 + num_extra]
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)]
    (model_dir / "tokenizer.model").write_text("".join(lines))
    return len(pieces)


def train_tokenizer_json(model_dir: Path, chat_template: str | None = None) -> None:
    """The kind of transformers' layouts: byte-level BPE with special tokens and a prefix, in tokenizer.json."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    prefix = [(name, backend.token_to_id(name)) for name in ("[gMASK]", "<sop>")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=prefix)
    backend.save(str(model_dir / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (model_dir / "tokenizer_config.json").write_text(json.dumps(settings))


def write_talking_model(path: Path) -> Path:
    """Four layers of random weights with a tokenizer, in that directory; the same path."""
    write_checkpoint(path, {**CAUSAL, "padded_vocab_size": 1024})
    train_chatglm2(path)
    return path
