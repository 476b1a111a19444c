"""From started workers to stages that serve, and the two ends of the model beside them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from coordinator.cluster import Cluster
from coordinator.memory import NoteSink, fitting_kv_budget
from coordinator.mending import Mender
from coordinator.plan import EndsPlan
from coordinator.recovery import MemoryKills
from glm.checkpoint import ModelSource, UnitSource
from glm.config import ModelConfig
from glm.ends import Embedding, Head, end_placement, has_own_lm_head
from glm.host_memory import num_oom_kills
from glm.layer_cache import with_cache
from glm.precision import Precision
from glm.weights import Placement


def bring_up(
    cluster: Cluster,
    mender: Mender,
    here: ModelSource | None,
    fetch: Callable[[], ModelSource],
    config: ModelConfig,
    on_note: NoteSink,
    *,
    refuse: bool,
) -> tuple[Embedding, Head, Path]:
    """Wait for the workers, look whether the plan fits, load all parts side by side; the ends, and where the model is.

    Weights that are not `here` are fetched once it fits. Workers killed meanwhile return, but not those killed for want
    of memory.

    Raises:
        LaunchError: a worker cannot be had or cannot hold its layers; NotEnoughMemory if `refuse` and it does not fit.
        GlmError: the model is not usable.
    """
    mender.join()
    plan, most_kv_tokens = cluster.plan, cluster.default_kv_budget_tokens
    kills = MemoryKills(num_oom_kills)
    memory: list[str] = []

    def note(line: str) -> None:
        memory.append(line)
        on_note(line)

    if here is not None:
        config = _untied(here, config, on_note)
    kv_tokens = fitting_kv_budget(plan, config, cluster.join(), most_kv_tokens, note, refuse=refuse)
    if here is None:
        here = fetch()
        config = _untied(here, config, on_note)
        cluster.tell_model(here.model_dir, here.fingerprint())
    cluster.assign(kv_tokens)
    ends = _load_ends(here, config, plan.ends)  # while the workers load
    mender.load(kills, memory)
    return *ends, here.model_dir


def _untied(checkpoint: ModelSource, config: ModelConfig, note: NoteSink) -> ModelConfig:
    """The config of what the files hold: their lm_head goes before a word that there is none but the embedding."""
    if isinstance(checkpoint, UnitSource) or not has_own_lm_head(checkpoint, config):
        return config
    note(
        f"note: {checkpoint.model_dir} holds an lm_head that differs from its embedding, though config.json ties them: "
        "the stored one is used"
    )
    return replace(config, tied_ends=False)


def _load_ends(checkpoint: ModelSource, config: ModelConfig, ends: EndsPlan) -> tuple[Embedding, Head]:
    def placed(precision: str, device: str) -> Placement:
        return end_placement(Precision.parse(precision), torch.device(device), config)

    def source(placement: Placement) -> ModelSource:
        return with_cache(checkpoint, config, placement.precision, placement.device)

    norm = placed(ends.final_layernorm_precision, ends.final_layernorm_device)
    lm_head = placed(ends.lm_head_precision, ends.lm_head_device)
    table = placed(ends.embedding_precision, ends.embedding_device)
    is_compared = not isinstance(checkpoint, UnitSource)  # by `_untied`
    embedding = Embedding.load(source(table), config, table, lm_head, is_compared=is_compared)
    return embedding, Head.load(source(lm_head), config, norm, lm_head, embedding)
