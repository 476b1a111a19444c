"""What a folder or a file of weights is that is no model as GLM's publisher writes them, and what to do about it."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path

from glm.errors import CheckpointError
from glm.json_file import read_json_object

UNFINISHED = "unfinished-conversion"
"""Marks a directory that `glm.convert` is writing, or was when it was killed."""

_SCHEMES = (
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".SCB", "bitsandbytes int8"),
    (".absmax", "bitsandbytes 4-bit"),
    (".quant_map", "bitsandbytes 4-bit"),
    (".W_q", "HQQ"),
    (".weight_packed", "compressed-tensors"),
    (".codebooks", "AQLM"),
)
"""By what others who quantise call their tensors."""
_UNQUANTISED = "use the model as published, which glmpipe quantises itself (--cpu-precision int4, or glmpipe convert)"
_PREFIX = "prefix_encoder."
_MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "VERA", "")


def scheme_complaint(scheme: object) -> str:
    """What to tell somebody whose weights were quantised by a scheme that is not the publisher's."""
    return f"the weights are quantised by {str(scheme)!r:.80}, which is not supported: {_UNQUANTISED}"


def foreign_names(names: Collection[str], missing: str) -> str | None:
    """What tensors of these names are, as far as one that is missing tells; None where they tell nothing."""
    for suffix, scheme in _SCHEMES:
        if any(name.endswith(suffix) for name in names):
            return scheme_complaint(scheme)
    if any(_PREFIX in name for name in names):
        return (
            "the file holds a P-Tuning prefix alone, which is no model and cannot be merged into one: name the model "
            "it was trained on, or fine-tune with LoRA and merge that"
        )
    if any(".lora_" in name for name in names):
        return f"the weights are those of a LoRA adapter: {_MERGE}"
    plain = missing.removesuffix("weight")
    wrapped = next((name for name in names if f".{missing}" in name or f".{plain}base_layer.weight" in name), None)
    if wrapped is None:
        return None
    prefix = wrapped[: wrapped.rindex(plain)]
    how = _MERGE if prefix == "base_model.model." else "save the model itself, not what wraps it, and name that"
    return f"the names of all tensors begin with {prefix!r:.80}: {how}"


_MERGE = "merge it into its base model (peft's merge_and_unload), save that, and name the directory saved"


def foreign_folder(model_dir: Path) -> str | None:
    """What a folder without config.json, or without weights, is; None where nothing in it tells."""
    try:
        names = sorted(path.name for path in model_dir.iterdir())
    except OSError as error:
        return f"{model_dir} cannot be read ({error.strerror}): check its permissions"
    if UNFINISHED in names:
        return (
            f"{model_dir} is a conversion that was not finished: run the same `glmpipe convert` again, which starts it "
            "anew, or wait if one is running"
        )
    if "adapter_config.json" in names:
        return _adapter(model_dir)
    return _other_programs_files(model_dir, names)


def _adapter(model_dir: Path) -> str:
    try:
        settings = read_json_object(model_dir / "adapter_config.json", CheckpointError)
    except CheckpointError:
        settings = {}
    kind, base = str(settings.get("peft_type") or "").upper(), settings.get("base_model_name_or_path")
    what = f"{kind} adapter"[:40].strip().encode("ascii", "replace").decode()
    of = f" of {json.dumps(base, ensure_ascii=False)[:120]}" if isinstance(base, str) and base else ""
    remedy = _MERGE if kind in _MERGEABLE else "such a one cannot be merged; name the model it was trained on"
    return f"{model_dir} holds an adapter ({what}{of}), not a model: {remedy}"


def _other_programs_files(model_dir: Path, names: Iterable[str]) -> str | None:
    kinds = (
        (".gguf", "GGUF, which llama.cpp reads"),
        (".ggml", "GGML, which chatglm.cpp reads"),
        (".onnx", "ONNX"),
        ("_states.pt", "DeepSpeed's, of which its zero_to_fp32.py makes a .bin"),
    )
    for suffix, kind in kinds:
        found = next((name for name in names if name.lower().endswith(suffix)), None)
        if found is not None:
            return f"{model_dir} has weights in another format ({found}: {kind}); {AS_PUBLISHED}"
    return None


AS_PUBLISHED = (
    "glmpipe reads what the publisher has, safetensors or .bin with its config.json: name a directory of that"
)
