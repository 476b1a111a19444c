"""What may lie in a model directory, or be a plan or a file of prompts: it is read, or one typed error names it."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random

import msgpack
import torch

from coordinator.batch_prompts import BatchDefaults, read_prompts
from coordinator.errors import CoordinatorError
from coordinator.planning import plan_for
from fuzz import sample_models
from fuzz.spoiled_files import spoiled_file
from fuzz.target import Finding, Target, allocating_at_most
from glm.chat_format import ChatMessage, chat_format_for
from glm.config import load_config
from glm.converted import ConvertedCheckpoint
from glm.errors import GlmError
from glm.generation import generation_defaults
from glm.layout import all_units
from glm.model import LayerStack
from glm.model_source import open_checkpoint
from glm.precision import Precision
from glm.tokenizer import load_tokenizer

MOST_BYTES = 64 * 2**20
"""What Python may allocate for files of some kilobytes; most of it is libraries being imported."""
Files = Mapping[str, bytes]
_MODEL = "model"
QUICK_DIR = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where files cost no disk."""


def read_weights(model_dir: Path) -> None:
    """Config, shards, every unit's tensors, a layer ready to compute."""
    config = load_config(model_dir)
    checkpoint = open_checkpoint(model_dir)
    checkpoint.fingerprint()
    plan_for(None, config.num_layers, ("cpu",))
    LayerStack.load(checkpoint, config, 0, min(2, config.num_layers), Precision.FP32, torch.device("cpu"))
    if isinstance(checkpoint, ConvertedCheckpoint):
        checkpoint.check()
        for unit in all_units(config):
            dict(checkpoint.read_unit(unit))


def read_tokenizer(model_dir: Path) -> None:
    """The tokenizer, there and back, the chat format and the defaults."""
    config = load_config(model_dir)
    tokenizer = load_tokenizer(model_dir, config)
    for text in ("Hello, 世界!\n\t  12", "<|user|>[gMASK]", "\ud800"):
        tokenizer.decode(tokenizer.encode_prompt(text), skip_special=False)
    tokenizer.decode([0, 1, 5, 300, 10**6, -1])
    generation_defaults(config, model_dir, tokenizer)
    chat_format_for(tokenizer).encode([ChatMessage("user", "Hello <|user|>")])


def read_plan(directory: Path) -> None:
    """A plan file, as for a model of four layers."""
    plan_for(directory / "plan.toml", 4, ("cpu",))


def read_prompt_file(directory: Path) -> None:
    """All lines of a file of prompts, faults told and faults raised."""
    list(read_prompts(directory / "prompts.jsonl", BatchDefaults(), lambda _: None))
    list(read_prompts(directory / "prompts.jsonl", BatchDefaults(sampling={"greedy": True}, raw=True)))


def mutate(data: bytes, other: bytes, rng: Random) -> bytes:
    """One to three files spoiled, lost, or taken from elsewhere."""
    files, others = unpacked(data), unpacked(other)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice([*files, *others] or ["config.json"])
        chance = rng.random()
        if chance < 0.03:
            files.pop(name, None)
        elif chance < 0.06 and name in others:
            files[name] = others[name]
        else:
            files[name] = spoiled_file(name, files.get(name, b""), others.get(name, b""), rng)
    return packed(files)


def check(read: Callable[[Path], None], data: bytes) -> None:
    """Write the files, read them; an error must be one of ours and name the directory or a file in it."""
    files = unpacked(data)
    root = Path(tempfile.mkdtemp(prefix="fuzz-", dir=QUICK_DIR))
    try:
        (root / _MODEL).mkdir()
        (root / "secret.safetensors").write_bytes(files.get("model.safetensors", b"secret"))
        (root / _MODEL / "link.safetensors").symlink_to("/dev/zero")
        for name, content in files.items():
            (root / _MODEL / name).write_bytes(content)
        with allocating_at_most(MOST_BYTES), _watching(root):
            read(root / _MODEL)
    except (GlmError, CoordinatorError) as error:
        text = str(error)
        if (
            str(root / _MODEL) not in text
            and not any(name in text for name in files)
            and not set(text.split()) & {"tokenizer", "template", "template:", "plan"}
        ):
            raise Finding(f"names no file: {text:.200}") from error
        if len(text) > 20_000:
            raise Finding(f"an error of {len(text)} characters") from error
    finally:
        shutil.rmtree(root)


class _watching:  # noqa: N801 - reads as a word
    """Raises Finding when a file beside the model directory, or a system's, was opened within."""

    root: Path | None = None
    opened: list[str]

    def __init__(self, root: Path) -> None:
        _hook_once()
        self._root = root

    def __enter__(self) -> None:
        _watching.root, _watching.opened = self._root, []

    def __exit__(self, *_: object) -> None:
        _watching.root = None
        if _watching.opened:
            raise Finding(f"opened {_watching.opened[0]}")


@cache
def _hook_once() -> None:
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        root = _watching.root
        if event != "open" or root is None or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        is_beside = path.startswith(str(root)) and not os.path.realpath(path).startswith(str(root / _MODEL))
        if is_beside or path.startswith(("/etc/passwd", "/dev/zero")):
            _watching.opened.append(path)

    sys.addaudithook(hook)


def packed(files: Files) -> bytes:
    """Files as one input."""
    packed: bytes = msgpack.packb(dict(files))
    return packed


def unpacked(data: bytes) -> dict[str, bytes]:
    """The files of an input; what is no such thing is a config.json."""
    try:
        found = msgpack.unpackb(data)
        return {
            str(name): bytes(content)
            for name, content in found.items()
            if isinstance(name, str)
            and isinstance(content, bytes)
            and 0 < len(name) < 200
            and not set(name) & {"/", "\0"}
            if name not in (".", "..", "link.safetensors")
        }
    except Exception:
        return {"config.json": data}


def _target(name: str, read: Callable[[Path], None], samples: Callable[[], Sequence[Files]]) -> Target:
    @cache
    def seeds() -> tuple[bytes, ...]:
        return tuple(map(packed, samples()))

    return Target(name, seeds, mutate, partial(check, read))


_PLAN = (
    b'model = "./x"\nrevision = "main"\nmax_num_seqs = 64\nmax_model_len = 2048\nprefill_chunk = 256\n'
    b'[[stage]]\ndevice = "cpu"\nlayers = "1-3"\nprecision = "int8"\nthreads = 4\nkv_budget_tokens = 4096\n'
    b'[[stage]]\ndevice = "cpu"\nlayers = 4\nkv_budget_tokens = 2000\n'
    b'[ends]\nembeddings = "cpu"\nfinal_layernorm = "cpu"\nlm_head = "cpu"\nprecision = "fp32"\n'
    b'lm_head_precision = "int8"\n'
)
_PROMPTS = b"\n".join(
    json.dumps(line, ensure_ascii=False).encode()
    for line in (
        {"prompt": "你好", "id": "a", "n": 2, "logprobs": 3, "temperature": 0.5, "seed": 1, "stop": ["x"]},
        {"messages": [{"role": "user", "content": "hi", "metadata": ""}], "id": 7, "max_new_tokens": 3},
        {"token_ids": [1, 2, 3], "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
        {"prompt": "x", "greedy": True, "ignore_eos": True, "max_new_tokens": 2, "stop": "y"},
    )
)

WEIGHTS = _target("weights", read_weights, sample_models.weights)
TOKENIZER = _target("tokenizer", read_tokenizer, sample_models.tokenizers)
PLAN = _target("plan", read_plan, lambda: [{"plan.toml": _PLAN}])
PROMPTS = _target("prompts", read_prompt_file, lambda: [{"prompts.jsonl": _PROMPTS}])
