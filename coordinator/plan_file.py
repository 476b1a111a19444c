"""Plan files: TOML to a `PlanRequest`. Only the form is checked here; `planning.resolve` checks the meaning.

model = "THUDM/chatglm-6b"        # a directory (relative to this file) or a hub id; --model wins over it
revision = "main"
max_num_seqs = 64                 # sequences that run at once
max_model_len = 2048              # tokens of a prompt and its answer together
prefill_chunk = 256               # prompt tokens in one step

[[stage]]
device = "cuda:0"                 # cpu, cuda:N
layers = "1-24"                   # counted from 1, inclusive
precision = "int8"                # fp32 bf16 fp16 int8 int4
threads = 4
kv_budget_tokens = 4096           # or kv_budget = "2GiB"
host = "lab2"                     # another host than the launching one, as `glmpipe keys list` calls it

[[stage]]
device = "cpu"
layers = "25-28"

[ends]
embeddings = "cpu"
final_layernorm = "cpu"
lm_head = "cpu"
precision = "fp32"                # of both ends
lm_head_precision = "int8"        # of lm_head alone
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coordinator.errors import PlanError, UsageError
from coordinator.input_files import MOST_PLAN_BYTES, decoded, read_input
from coordinator.plan_request import Option, PlanRequest, StageRequest
from glm.command_line import nearest
from glm.home import expanded
from glm.hub import HUB_ID
from glm.shapes import random_shape

_TOP_KEYS: Mapping[str, type] = {
    "model": str,
    "revision": str,
    "max_num_seqs": int,
    "max_model_len": int,
    "prefill_chunk": int,
    "stage": list,
    "ends": dict,
}
_STAGE_KEYS: Mapping[str, type] = {
    "device": str,
    "layers": str,
    "precision": str,
    "threads": int,
    "kv_budget_tokens": int,
    "kv_budget": str,
    "host": str,
}
_ENDS_KEYS: Mapping[str, type] = dict.fromkeys(
    ("embeddings", "final_layernorm", "lm_head", "precision", "lm_head_precision"), str
)
_QUOTES = "\"'“”„‘’«»"
_TYPE_NAMES = {
    str: "a string",
    int: "a whole number",
    list: "an array of tables, each under its own [[stage]]",
    dict: "a table, under [ends]",
}


def read_plan_file(path: Path) -> PlanRequest:
    """The request that a plan file holds, with the faults of its form in `.faults`.

    Raises PlanError when the file cannot be read as TOML at all.
    """
    try:
        text = decoded(read_input(path, "the plan file", MOST_PLAN_BYTES))
        table = tomllib.loads(text)
    except UsageError as error:
        raise PlanError([str(error)]) from None
    except UnicodeDecodeError:
        raise PlanError([f"the plan file {path} is not UTF-8 text"]) from None
    except RecursionError:
        raise PlanError([f"the plan file {path} is nested too deeply"]) from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise PlanError([f"the plan file {path} is not TOML: {error}{_hint(text, str(error))}"]) from None
    return plan_request_of(table, path.parent)


def _hint(text: str, complaint: str) -> str:
    """What was probably meant by the line that is no TOML, where that can be guessed."""
    place = re.search(r"at line (\d+)", complaint)
    lines = text.splitlines()
    line = lines[int(place[1]) - 1].strip()[:80] if place and int(place[1]) <= len(lines) else ""
    entry = re.match(r"([\w.-]+)\s*([=:])\s*([^#]*)", line)
    if entry is None:
        return f": {line}" if line else ""
    key, sign, value = entry[1], entry[2], entry[3].strip()
    plain = value.strip(_QUOTES)
    if not plain or value[0] in "[{" or (sign == "=" and _is_value(value)):
        return f": {line}"
    is_open = value[0] in _QUOTES and (len(value) == 1 or value[-1] not in _QUOTES)
    what = "the closing quote is missing" if is_open else "text needs quotes" if sign == "=" else "write '='"
    return f': {line} ({what}: {key} = "{plain}")'


def _is_value(text: str) -> bool:
    try:
        tomllib.loads(f"key = {text}")
    except ValueError:
        return False
    return True


def plan_request_of(table: Mapping[str, Any], base: Path = Path()) -> PlanRequest:
    """The request a parsed plan file means; a model's directory lies relative to `base`."""
    faults: list[str] = []
    top = _checked(table, _TOP_KEYS, "", faults)
    entries = top.get("stage", [])
    stages = [_stage(entry, number, faults) for number, entry in enumerate(entries, start=1)]
    if not top.get("stage", table.get("stage")) and not _is_mistyped("stage", table, _TOP_KEYS):
        faults.append('no stage; add at least one [[stage]] with device = "cpu" and layers = "1-28"')
    ends = _checked(top.get("ends", {}), _ENDS_KEYS, "[ends] ", faults)
    options = {name: Option(f"[ends] {name}", text) for name, text in ends.items()}
    return PlanRequest(
        stages=tuple(stage for stage in stages if stage is not None),
        embeddings=options.get("embeddings"),
        final_layernorm=options.get("final_layernorm"),
        lm_head=options.get("lm_head"),
        ends_precision=options.get("precision"),
        lm_head_precision=options.get("lm_head_precision"),
        model=_model(top.get("model"), base, faults),
        revision=top.get("revision"),
        max_num_seqs=top.get("max_num_seqs"),
        max_model_len=top.get("max_model_len"),
        prefill_chunk=top.get("prefill_chunk"),
        faults=tuple(faults),
        is_complete=bool(stages) and None not in stages,
    )


def _stage(entry: object, number: int, faults: list[str]) -> StageRequest | None:
    origin = f"[[stage]] {number}"
    if not isinstance(entry, dict):
        faults.append(f"{origin} is not a table; write [[stage]] on a line of its own")
        return None
    if isinstance(entry.get("layers"), int) and not isinstance(entry["layers"], bool):
        entry = {**entry, "layers": str(entry["layers"])}
    known = _checked(entry, _STAGE_KEYS, f"{origin}: ", faults)
    missing = [key for key in ("device", "layers") if key not in entry and not _is_mistyped(key, entry, _STAGE_KEYS)]
    faults += [f"{origin}: {key} is missing" for key in missing]
    if "device" not in known or "layers" not in known:
        return None
    return StageRequest(
        origin=origin,
        device=known["device"],
        layers=known["layers"],
        precision=known.get("precision"),
        num_threads=known.get("threads"),
        kv_budget_tokens=known.get("kv_budget_tokens"),
        kv_budget=known.get("kv_budget"),
        host=known.get("host"),
    )


def _checked(table: Mapping[str, Any], known: Mapping[str, type], where: str, faults: list[str]) -> dict[str, Any]:
    """The entries of `table` that have a known name and the right type; the others become faults."""
    good = {}
    for key, value in table.items():
        if key not in known:
            faults.append(f"{where}unknown key {key!r}; {_nearest(key, known)}")
        elif type(value) is not known[key]:
            faults.append(f"{where}{key} must be {_TYPE_NAMES[known[key]]}, not {value!r}")
        else:
            good[key] = value
    return good


def _nearest(key: str, known: Mapping[str, type]) -> str:
    if key in _TOP_KEYS and known is not _TOP_KEYS:
        return "it belongs to the top of the file, above the first [[stage]]"
    close = nearest(key, known)
    return f"did you mean {close!r}?" if close else f"the keys here are {', '.join(known)}"


def _is_mistyped(key: str, table: Mapping[str, Any], known: Mapping[str, type]) -> bool:
    """Whether an unknown key of the table is told as this one already."""
    return any(nearest(given, known) == key for given in table if given not in known)


def _model(name: str | None, base: Path, faults: list[str]) -> str | None:
    """A directory is looked for beside the plan file; what is none there and has the form of a hub id is one."""
    if name is None or random_shape(name):
        return name
    if not name.strip():
        faults.append("model is empty; name a directory or a hub id, or leave it out for the demo model")
        return None
    if name.startswith("~"):
        return str(expanded(name))
    if os.path.isdir(base / name) or not HUB_ID.fullmatch(name):  # noqa: PTH112 - Path.is_dir raises for lack of rights
        return str(base / name)
    if os.path.isdir(name):  # noqa: PTH112
        faults.append(
            f"model {name!r} is a directory here, but not beside the plan file, and paths in it are relative to it: "
            f"write {os.path.relpath(name, base)!r}"
        )
    return name
