"""The random model for llama.cpp: a file that follows the format, of the size that its tensors have."""

import struct
from pathlib import Path

import pytest
import torch

from benchmarks.make_random_gguf import ALIGNMENT, KINDS, metadata, tensors, write


def test_the_file_begins_as_a_gguf_and_its_size_is_that_of_header_and_tensors(tmp_path: Path) -> None:
    """Magic word, version 3, counts; after the header every tensor with its padding and nothing else."""
    path = tmp_path / "tiny.gguf"
    size = write(path, "int4", num_layers=0)
    assert path.stat().st_size == size
    contents = tensors("int4", 0)
    with path.open("rb") as file:
        assert file.read(24) == b"GGUF" + struct.pack("<IQQ", 3, len(contents), len(metadata("int4", 0)))
        data_bytes = sum(-(-tensor.num_bytes // ALIGNMENT) * ALIGNMENT for tensor in contents)
        file.seek(size - data_bytes)
        blocks = torch.frombuffer(bytearray(file.read(18 * 1000)), dtype=torch.uint8).view(1000, 18)
    scales = blocks[:, :2].contiguous().view(torch.float16)
    assert scales.unique().numel() == 1, "the first tensor does not begin where its blocks do"
    nibbles = torch.cat([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], dim=1).float() - 8
    assert float((nibbles * scales.float()).std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("precision", "gigabytes"), [("int4", 3.58), ("int8", 6.64), ("bf16", 12.49)])
def test_sizes_are_those_that_llama_quantize_gives(precision: str, gigabytes: float) -> None:
    """3.34 and 6.18 GiB for Q4_0 and Q8_0 of the 6B shape; lm_head of the former in Q6_K."""
    contents = tensors(precision, 28)
    assert sum(tensor.num_bytes for tensor in contents) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert (contents[-1].name, contents[-1].kind == "q6_k") == ("output.weight", precision == "int4")
    assert all(tensor.shape[-1] % KINDS[tensor.kind].size == 0 for tensor in contents)
