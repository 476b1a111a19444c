"""Whole layers with the CUDA kernels in all their places, run by the emulation, against torch alone."""

from pathlib import Path

import pytest
import torch

from glm import weights
from glm.attention import Segment
from glm.block import CausalBlock
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.kernels.cuda.kernels import CudaKernels
from glm.linear import CudaLinear, QuantizedLinear
from glm.model import LayerStack
from glm.precision import Precision
from tests.glm.kernels.cuda_emulation import COMPILER, EmulatedModule, emulated_kernels
from tests.tiny_checkpoints import FAMILIES, write_checkpoint

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here to build the emulation with")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CudaKernels:
    return emulated_kernels(tmp_path_factory.mktemp("emulated"), torch.float32)


def run(stack: LayerStack) -> torch.Tensor:
    """A prompt of 11 tokens, then two steps of one."""
    generator, cache = torch.Generator().manual_seed(0), stack.new_cache()
    found = []
    for num_tokens in (11, 1, 1):
        hidden = torch.randn(num_tokens, stack.config.hidden_size, generator=generator)
        found.append(stack.forward(hidden, [Segment(cache, cache.length, num_tokens)]))
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_layers(
    kernels: CudaKernels, family: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same hidden states to the last digits of fp32, through fused products, dequantised ones and all steps."""
    write_checkpoint(tmp_path, FAMILIES[family])
    config, checkpoint = load_config(tmp_path), Checkpoint(tmp_path)
    stacks = []
    assert isinstance(kernels._module, EmulatedModule)
    kernels._module.launched.clear()
    for chosen in (None, kernels):
        monkeypatch.setattr(weights, "best_kernels", lambda chosen=chosen: chosen)
        stacks.append(LayerStack.load(checkpoint, config, 0, 2, precision, torch.device("cpu")))
    plain, with_kernels = stacks
    assert isinstance(plain.blocks[0].linears.dense, QuantizedLinear)
    assert isinstance(with_kernels.blocks[0].linears.dense, CudaLinear)
    torch.testing.assert_close(run(with_kernels), run(plain), rtol=1e-4, atol=1e-5)
    used = {name.partition("_")[0] for name in kernels._module.launched}
    steps = {"rms", "gate", "rotate"} if isinstance(plain.blocks[0], CausalBlock) else set()
    assert used == {"product", "dequantise"} | steps
