"""A llama.cpp model of the ChatGLM2-6B shape with random weights, as benchmarks/peers.py measures it.

    python -m benchmarks.make_random_gguf OUT.gguf --precision int4|int8|bf16 [--layers 28]

int4 and int8 give the tensor types that llama-quantize gives a whole model for Q4_0 (lm_head in Q6_K) and Q8_0. Blocks
of random bits are written as they are, with the scale that makes the spread 0.02: seconds, and no float model on disk.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from glm.shapes import SHAPES

SHAPE = SHAPES["chatglm2-6b"]
SPREAD = 0.02
ALIGNMENT = 32
POOL_BLOCKS = 1 << 20
FILE_TYPES = {"int4": 2, "int8": 7, "bf16": 32}
# Tags of values in a GGUF file's metadata.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6
"""Kinds of tokens."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way of storing numbers: blocks of `size` numbers in `block_bytes`, of which some are an fp16 scale."""

    number: int
    size: int
    block_bytes: int
    scale_at: int | None = None
    scale: float = 0.0


# Scales divide by the spread of the integers: -8..7, -127..127, and -32..31 times the block's own scale of -128..127.
KINDS = {
    "f32": Kind(0, 1, 4),
    "bf16": Kind(30, 1, 2),
    "q4_0": Kind(2, 32, 18, 0, SPREAD / 4.6),
    "q8_0": Kind(8, 32, 34, 0, SPREAD / 74),
    "q6_k": Kind(14, 256, 210, 208, SPREAD / 18.5 / 74),
}
MATRIX_KINDS = {"int4": ("q4_0", "q6_k"), "int8": ("q8_0", "q8_0"), "bf16": ("bf16", "bf16")}
"""Of a precision: the kind of all matrices, and that of lm_head."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written; `shape` is [rows, columns] or [size], `value` that of every element of a vector."""

    name: str
    shape: tuple[int, ...]
    kind: str
    value: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Without padding."""
        kind = KINDS[self.kind]
        return math.prod(self.shape) // kind.size * kind.block_bytes


def tensors(precision: str, num_layers: int) -> list[Tensor]:
    """All of a model's, in the order of the file."""
    matrix, lm_head = MATRIX_KINDS[precision]
    hidden, ffn, vocab = SHAPE["hidden_size"], SHAPE["ffn_hidden_size"], SHAPE["padded_vocab_size"]
    fused = hidden + 2 * SHAPE["multi_query_group_num"] * SHAPE["kv_channels"]
    found = [Tensor("token_embd.weight", (vocab, hidden), matrix)]
    for layer in range(num_layers):
        prefix = f"blk.{layer}."
        found += [
            Tensor(f"{prefix}attn_norm.weight", (hidden,), "f32", 1.0),
            Tensor(f"{prefix}attn_qkv.weight", (fused, hidden), matrix),
            Tensor(f"{prefix}attn_qkv.bias", (fused,), "f32", 0.01),
            Tensor(f"{prefix}attn_output.weight", (hidden, hidden), matrix),
            Tensor(f"{prefix}ffn_norm.weight", (hidden,), "f32", 1.0),
            Tensor(f"{prefix}ffn_up.weight", (2 * ffn, hidden), matrix),
            Tensor(f"{prefix}ffn_down.weight", (hidden, ffn), matrix),
        ]
    norm = Tensor("output_norm.weight", (hidden,), "f32", 1.0)
    return [*found, norm, Tensor("output.weight", (vocab, hidden), lm_head)]


def metadata(precision: str, num_layers: int) -> dict[str, bytes]:
    """Keys and encoded values: the architecture, and a vocabulary of made-up words."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"\u2581word{i}" for i in range(len(tokens), SHAPE["padded_vocab_size"])]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    return {
        "general.architecture": _string("chatglm"),
        "general.name": _string(f"random chatglm2-6b, {precision}"),
        "general.file_type": _uint(FILE_TYPES[precision]),
        "general.alignment": _uint(ALIGNMENT),
        "chatglm.context_length": _uint(SHAPE["seq_length"]),
        "chatglm.embedding_length": _uint(SHAPE["hidden_size"]),
        "chatglm.feed_forward_length": _uint(SHAPE["ffn_hidden_size"]),
        "chatglm.block_count": _uint(num_layers),
        "chatglm.attention.head_count": _uint(SHAPE["num_attention_heads"]),
        "chatglm.attention.head_count_kv": _uint(SHAPE["multi_query_group_num"]),
        "chatglm.attention.layer_norm_rms_epsilon": _float(1e-5),
        "chatglm.rope.dimension_count": _uint(SHAPE["kv_channels"] // 2),
        "chatglm.rope.freq_base": _float(10000.0),
        "tokenizer.ggml.model": _string("llama"),
        "tokenizer.ggml.pre": _string("chatglm-spm"),
        "tokenizer.ggml.tokens": _array(STRING, [_text(token) for token in tokens]),
        "tokenizer.ggml.scores": _array(FLOAT32, [struct.pack("<f", -i) for i in range(len(tokens))]),
        "tokenizer.ggml.token_type": _array(INT32, [struct.pack("<i", kind) for kind in kinds]),
        "tokenizer.ggml.unknown_token_id": _uint(0),
        "tokenizer.ggml.bos_token_id": _uint(1),
        "tokenizer.ggml.eos_token_id": _uint(2),
        "tokenizer.ggml.add_bos_token": struct.pack("<IB", BOOL, 0),
    }


def write(path: Path, precision: str, num_layers: int) -> int:
    """Write the file; returns its size in bytes."""
    contents = tensors(precision, num_layers)
    with path.open("wb") as file:
        pairs = metadata(precision, num_layers)
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(contents), len(pairs)))
        for key, value in pairs.items():
            file.write(_text(key) + value)
        offset = 0
        for tensor in contents:
            file.write(_description(tensor, offset))
            offset += _padded(tensor.num_bytes)
        file.write(bytes(_padded(file.tell()) - file.tell()))
        pools = {kind: _pool(KINDS[kind]) for kind in set(MATRIX_KINDS[precision])}
        for index, tensor in enumerate(contents):
            for part in _data(tensor, pools, index):
                file.write(part)
            file.write(bytes(_padded(tensor.num_bytes) - tensor.num_bytes))
        return file.tell()


def _description(tensor: Tensor, offset: int) -> bytes:
    """Name, dimensions (the fastest first), kind, offset from the beginning of all data."""
    dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
    return _text(tensor.name) + dimensions + struct.pack("<IQ", KINDS[tensor.kind].number, offset)


def _pool(kind: Kind) -> memoryview:
    """Random blocks, from which all matrices of a kind are cut."""
    generator = torch.Generator().manual_seed(1)
    if kind.scale_at is None:
        numbers = torch.randn(POOL_BLOCKS * 32, generator=generator).mul_(SPREAD).to(torch.bfloat16)
        return numbers.view(torch.uint8).numpy().data
    count = POOL_BLOCKS * 32 // kind.size
    blocks = torch.randint(0, 256, (count, kind.block_bytes), dtype=torch.uint8, generator=generator)
    scale = torch.tensor([kind.scale], dtype=torch.float16).view(torch.uint8)
    blocks[:, kind.scale_at : kind.scale_at + 2] = scale
    return blocks.flatten().numpy().data


def _data(tensor: Tensor, pools: dict[str, memoryview], index: int) -> Iterator[bytes | memoryview]:
    """A tensor's bytes; matrices begin somewhere in their kind's pool and go round it."""
    if tensor.kind == "f32":
        yield struct.pack("<f", tensor.value) * math.prod(tensor.shape)
        return
    pool, left = pools[tensor.kind], tensor.num_bytes
    at = index * 7919 % POOL_BLOCKS // 32 * KINDS[tensor.kind].block_bytes
    while left:
        part = pool[at : at + left]
        yield part
        left, at = left - len(part), 0


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _string(text: str) -> bytes:
    return struct.pack("<I", STRING) + _text(text)


def _uint(value: int) -> bytes:
    return struct.pack("<II", UINT32, value)


def _float(value: float) -> bytes:
    return struct.pack("<If", FLOAT32, value)


def _array(kind: int, values: list[bytes]) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, len(values)) + b"".join(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--precision", choices=tuple(FILE_TYPES), required=True)
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"])
    options = parser.parse_args()
    print(f"{options.out}: {write(options.out, options.precision, options.layers) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
