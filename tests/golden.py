"""Reads the reference outputs of the original implementations (see the README beside them)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

SETS = (
    "chatglm",
    "chatglm-28l",
    "chatglm2",
    "chatglm2-safetensors",
    "chatglm3",
    "glm4",
    "chatglm-int8",
    "chatglm-int4",
    "chatglm-int4-qe",
    "chatglm2-int4",
)
CHUNKED_SETS = ("chatglm2", "chatglm2-safetensors", "chatglm3", "glm4")
PREFIX_SETS = tuple(name for name in SETS if name == "chatglm" or name.startswith("chatglm-"))


@dataclass(frozen=True)
class GoldenCase:
    """One row of one case: its token ids and the reference tensors of that row at its real (unpadded) tokens."""

    case: str
    row: int
    token_ids: tuple[int, ...]
    positions: torch.Tensor  # sequence positions, counted without padding, at which layer tensors are given
    tensors: dict[str, torch.Tensor]  # name -> the row's tensor, padding removed
    greedy_ids: tuple[int, ...] | None


class GoldenSet:
    """One directory of reference outputs."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.checkpoint_dir = root / "golden" / name / "checkpoint"
        source = root / "golden" / name.removesuffix("-safetensors")
        self.facts = json.loads((source / "golden.json").read_text())
        self._file = source / "golden.safetensors"

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self._file)

    def bound(self, kind: str) -> float:
        """The absolute fp32 bound the set states for "logits", "final_norm", "k", "v" or "hidden"."""
        stated = self.facts.get("tolerance", {}).get("fp32_max_abs", {})
        return float(stated.get(kind, 2e-3 if kind == "hidden" else 5e-4))

    def rows(self) -> Iterator[GoldenCase]:
        """Every row of every case that is one prefill followed by greedy decoding (or prefill alone)."""
        for case in self.facts["cases"]:
            if f"{case}/logits" in self.tensors:
                ids, valid = self.tensors[f"{case}/input_ids"], self.tensors[f"{case}/valid"]
                yield from (self._row(case, row, ids[row], valid[row]) for row in range(len(ids)))

    def _row(self, case: str, row: int, ids: torch.Tensor, valid: torch.Tensor) -> GoldenCase:
        num_pads = int((~valid).sum())
        seq = len(ids)
        given = self.tensors.get(f"{case}/positions", torch.arange(seq))
        keep = given >= num_pads
        tensors = {}
        for full_name, tensor in self.tensors.items():
            name = full_name.removeprefix(f"{case}/")
            if name == full_name or name in ("input_ids", "valid", "positions", "attention_mask", "position_ids"):
                continue
            if name.startswith("greedy."):
                continue
            if name == "logits":
                last = tensor[row]
                tensors[name] = last[max(0, len(last) - (seq - num_pads)) :]
            else:
                tensors[name] = tensor[row][keep]
        greedy = self.tensors.get(f"{case}/greedy.ids")
        if greedy is not None:
            tensors["greedy.logits"] = self.tensors[f"{case}/greedy.logits"][row]
        return GoldenCase(
            case=case,
            row=row,
            token_ids=tuple(ids[num_pads:].tolist()),
            positions=given[keep] - num_pads,
            tensors=tensors,
            greedy_ids=None if greedy is None else tuple(greedy[row].tolist()),
        )
