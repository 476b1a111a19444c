"""Random weights: the published shapes, the same numbers everywhere, no memory of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm.attention import Segment
from glm.config import load_config, parse_config
from glm.errors import MissingTensorError, ModelNotFoundError, TensorShapeError
from glm.hub import resolve_model
from glm.layout import layer_sources, stored_shapes
from glm.model import LayerStack, Model
from glm.model_source import open_checkpoint
from glm.precision import Precision
from glm.random_checkpoint import RandomCheckpoint
from glm.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
TINY = Path("random:tiny")
CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("shape", "published"),
    [("chatglm-6b", "chatglm-6b"), ("chatglm2-6b", "chatglm2-6b"), ("glm-4-9b", "glm-4-9b-chat")],
)
def test_shapes_are_the_published_ones(shape: str, published: str, shared_dir: Path) -> None:
    """All that the network knows of a model follows from the table as it does from the model's own config.json."""
    path = shared_dir / "golden" / "published" / published / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw.pop("_name_or_path")
    raw.pop("transformers_version")
    assert parse_config(SHAPES[shape]) == parse_config(raw)


@pytest.mark.parametrize(("shape", "billions"), [("chatglm-6b", 6.7), ("chatglm2-6b", 6.2), ("glm-4-9b", 9.4)])
def test_large_shapes_are_made_at_once(shape: str, billions: float) -> None:
    """Every tensor of billions of weights, with the right shape and dtype, from one small pool."""
    config = load_config(Path(f"random:{shape}"))
    source = open_checkpoint(Path(f"random:{shape}"))
    shapes, pools, num_weights = stored_shapes(config), set(), 0
    for name, tensor in source.read(shapes):
        assert tuple(tensor.shape) == shapes[name]
        assert str(tensor.dtype) == f"torch.{config.stored_dtype}"
        num_weights += tensor.numel()
        if tensor.dim() == 2:
            pools.add(tensor.untyped_storage().data_ptr())
            assert tensor.untyped_storage().nbytes() <= 16 * MIB
    assert len(pools) == 1
    assert round(num_weights / 1e9, 1) == billions


def test_a_name_has_the_same_values_in_every_process_and_other_names_have_others() -> None:
    """So that workers which share no memory hold parts of one model."""
    config = load_config(TINY)
    first, second = (dict(RandomCheckpoint(TINY).read(stored_shapes(config))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    matrices = [tensor for name, tensor in first.items() if name.endswith("dense.weight")]
    assert len(matrices) == config.num_layers
    assert not torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0][0], matrices[0][1])
    assert float(matrices[0].float().std()) == pytest.approx(0.02, rel=0.1)


def test_it_refuses_what_a_checkpoint_refuses() -> None:
    """Absent names, wrong shapes; and shapes that do not exist, naming those that do."""
    source = RandomCheckpoint(TINY)
    name = layer_sources(load_config(TINY), 0)["dense.weight"].names[0]
    assert name in source
    assert f"{name}_scale" not in source
    with pytest.raises(MissingTensorError, match="no tensor nothing"):
        next(source.read({"nothing": (1,)}))
    with pytest.raises(TensorShapeError, match=r"\[128, 128\], not \[1, 2\]"):
        next(source.read({name: (1, 2)}))
    with pytest.raises(ModelNotFoundError, match="no shape 'huge'; choose one of chatglm-6b"):
        resolve_model("random:huge")
    with pytest.raises(ModelNotFoundError, match="has no revision"):
        resolve_model("random:tiny", "main")


def test_fingerprints_tell_shapes_apart() -> None:
    """A worker that makes other numbers than the coordinator is found out."""
    prints = {RandomCheckpoint(Path(f"random:{shape}")).fingerprint() for shape in SHAPES}
    assert len(prints) == len(SHAPES)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_model_of_random_weights_computes(precision: str) -> None:
    """Finite scores that tell tokens apart, at every precision; the layers weigh what their shapes say."""
    config = load_config(resolve_model("random:tiny"))
    model = Model.load(open_checkpoint(TINY), config, Precision(precision))
    assert len({model.greedy([token_id], 1)[0] for token_id in range(10, 20)}) > 5
    hidden = model.embedding.forward(torch.arange(8))
    scores = model.head.forward(model.layers.forward(hidden, [Segment(model.layers.new_cache(), 0, 8, None)]))
    assert scores.isfinite().all()
    stack = LayerStack.load(open_checkpoint(TINY), config, 1, 3, Precision.FP32, CPU)
    sizes = (config.qkv_size + config.hidden_size, config.hidden_size), (3 * config.ffn_size, config.hidden_size)
    assert stack.weight_bytes == 2 * 4 * (sum(a * b for a, b in sizes) + config.qkv_size)


# The kernel's high-water mark before and after two layers of the 6B shape at int8, which are 0.4 GB, 0.8 as floats.
LOAD = """
import json, sys
from pathlib import Path
import torch
from glm.attention import Segment
from glm.config import load_config
from glm.model import LayerStack
from glm.precision import Precision
from glm.model_source import open_checkpoint
def peak_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
torch.set_num_threads(1)
where = Path("random:chatglm2-6b")
before = peak_bytes()
stack = LayerStack.load(open_checkpoint(where), load_config(where), 3, 5, Precision.INT8, torch.device("cpu"))
print(json.dumps({"weight_bytes": stack.weight_bytes, "grown_bytes": peak_bytes() - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the peak that Linux keeps")
def test_loading_takes_the_memory_of_the_result() -> None:
    """Float weights are never in memory, not even one layer's 0.4 GB."""
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weight_bytes"] > 380 * MIB
    assert found["grown_bytes"] < found["weight_bytes"] + 200 * MIB
