"""A loading worker needs its own weights, a little of the checkpoint, and the libraries: never the whole model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_checkpoints import CAUSAL, NATIVE, write_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak that Linux keeps"),
]

REPOSITORY = Path(__file__).resolve().parents[2]
MIB = 1 << 20
FIRST, END, NUM_LAYERS = 5, 9, 14
ALLOWANCE_BYTES = 400 * MIB

# The kernel's high-water mark of this very program (ru_maxrss would count the parent's); pages of mapped files too.
PEAK = """
def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
"""

# Everything a worker imports, then the layers.
LOAD = """
import json, sys
from pathlib import Path
import torch
import stage_worker.cli, stage_worker.worker
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.model import LayerStack
from glm.precision import Precision
torch.set_num_threads(1)
model_dir, precision, first, end = Path(sys.argv[1]), Precision(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
stack = LayerStack.load(Checkpoint(model_dir), load_config(model_dir), first, end, precision, torch.device("cpu"))
print(json.dumps({"weight_bytes": stack.weight_bytes, "peak_bytes": peak_bytes()}))
"""

# One matrix of the size of GLM-4-9B's largest, as stored and at a precision.
QUANTIZE = """
import json, sys
import torch
from glm.linear import make_weight, tensor_bytes
from glm.precision import Precision
from glm.quantization import QuantizedWeight
torch.set_num_threads(1)
source, precision = sys.argv[1], Precision(sys.argv[2])
if source == "int8":
    stored = QuantizedWeight(torch.ones(27392, 4096, dtype=torch.int8), torch.ones(27392, 1).half(), 8)
else:
    stored = torch.ones(27392, 4096, dtype=torch.float16)
make_weight(torch.ones(8, 64), Precision.INT4, torch.float32, torch.device("cpu"))
before = peak_bytes()
weight = make_weight(stored, precision, torch.bfloat16, torch.device("cpu"))
own = weight.num_bytes if isinstance(weight, QuantizedWeight) else tensor_bytes(weight)
print(json.dumps({"own_bytes": own, "grown_bytes": peak_bytes() - before}))
"""


@dataclass(frozen=True)
class Generated:
    """A checkpoint of some hundred MB with layers of equal size."""

    model_dir: Path
    total_bytes: int
    layer_bytes: int


def run(program: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK + program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=["chatglm2-safetensors", "chatglm2-bin", "glm-safetensors"])
def generated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generated]:
    family, suffix = request.param.split("-")
    model_dir = tmp_path_factory.mktemp("large") / request.param
    dims = {"hidden_size": 1536, "num_attention_heads": 12, "torch_dtype": "float16"}
    chatglm2 = {"kv_channels": 128, "ffn_hidden_size": 4096, "num_layers": NUM_LAYERS}
    native = {"head_dim": 128, "intermediate_size": 4096, "num_hidden_layers": NUM_LAYERS}
    keys = {**CAUSAL, **dims, **chatglm2} if family == "chatglm2" else {**NATIVE, **dims, **native}
    config = write_checkpoint(model_dir, keys, suffix=suffix, num_shards=3)
    layer_weights = config.hidden_size * (config.qkv_size + config.num_heads * config.head_dim + 3 * config.ffn_size)
    total_bytes = sum(path.stat().st_size for path in model_dir.iterdir())
    yield Generated(model_dir, total_bytes, 2 * layer_weights)
    shutil.rmtree(model_dir)


@pytest.mark.parametrize("precision", ["bf16", "fp32", "int8", "int4"])
def test_peak_memory_of_a_loading_worker(generated: Generated, precision: str) -> None:
    """Four layers from the middle: peak below own weights + 2 stored layers + 400 MB, which the whole would exceed."""
    found = run(LOAD, str(generated.model_dir), precision, str(FIRST), str(END))
    bound = found["weight_bytes"] + 2 * generated.layer_bytes + ALLOWANCE_BYTES
    assert found["peak_bytes"] < bound < found["weight_bytes"] + generated.total_bytes


@pytest.mark.parametrize(
    ("source", "precision"),
    [("fp16", "int8"), ("fp16", "int4"), ("fp16", "bf16"), ("int8", "int4"), ("int8", "bf16")],
)
def test_a_big_matrix_needs_no_second_copy(source: str, precision: str) -> None:
    """27392 x 4096 from what is stored to a precision: beside the result 64 MB do, an fp32 copy would take 428."""
    found = run(QUANTIZE, source, precision)
    assert found["grown_bytes"] < found["own_bytes"] + 64 * MIB
