"""What quantising costs in quality stays within its bounds, measured as docs/measurements.md does."""

import pytest

from benchmarks.quality import HeldOut, Scheme, held_out, measure, model_of
from glm.checkpoint import Checkpoint
from glm.config import ModelConfig, load_config
from glm.demo import demo_model_dir
from glm.model import Model
from glm.precision import Precision

FP32, INT8, INT4 = Precision.FP32, Precision.INT8, Precision.INT4


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return load_config(demo_model_dir())


@pytest.fixture(scope="module")
def text() -> HeldOut:
    return held_out(demo_model_dir(), seed=21, num_conversations=60)


def held(config: ModelConfig, layers: Precision, head: Precision) -> Model:
    return model_of(Scheme("", "", 0, layers, head), Checkpoint(demo_model_dir()), config)


@pytest.mark.parametrize(("layers", "most"), [(INT8, 0.003), (INT4, 0.03)])
def test_perplexity_hardly_rises(config: ModelConfig, text: HeldOut, layers: Precision, most: float) -> None:
    """With lm_head in int8, as plans have it: int8 at most 0.3% more than fp32, int4 at most 3%."""
    reference = held(config, FP32, FP32)
    base, found = (measure(model, reference, text) for model in (reference, held(config, layers, INT8)))
    assert base.perplexity > 1.01 and base.max_error == 0
    assert found.perplexity <= (1 + most) * base.perplexity
    assert found.mean_error > 0
