"""From an assignment to a stage that can serve."""

from collections.abc import Callable
from pathlib import Path

import torch

from glm.config import load_config
from glm.demo import demo_model_dir
from glm.errors import GlmError, ModelNotFoundError
from glm.hub import is_directory, resolve_model
from glm.layer_cache import CachedCheckpoint, with_cache
from glm.model import LayerStack
from glm.model_source import open_checkpoint
from glm.precision import Precision
from glm.shapes import random_shape
from protocol.control import Assign, HostModel
from stage_worker.cli import OwnModel
from stage_worker.errors import AbandonedError, LoadError
from stage_worker.log import logger
from stage_worker.memory import is_out_of_memory
from stage_worker.stage import Stage

LoadProgress = Callable[[int, int, int], None]


def host_model(model: OwnModel | None) -> HostModel | None:
    """What is known of the model that this host was told to load; None of a hub's, which is fetched when assigned.

    Raises GlmError.
    """
    if model is None or not (is_directory(model.name) or random_shape(model.name)):
        return None
    model_dir = resolve_model(model.name, model.revision)
    return HostModel(model.name, open_checkpoint(model_dir).fingerprint(), load_config(model_dir).num_layers)


def load_stage(assign: Assign, device: torch.device, progress: LoadProgress, model: OwnModel | None = None) -> Stage:
    """Load the assigned layers; `progress(layers_done, layers_total, weight_bytes)` after each.

    `model` says where this host has the assigned model; None looks where the assignment says.

    Raises:
        LoadError: whatever was wrong, in words for the user.
        AbandonedError: `progress` raised it.
    """
    try:
        layers = _load_layers(assign, _model_dir(assign, model), device, progress)
        return Stage(layers, assign.kv_budget_tokens, assign.record_hidden_states)
    except (AbandonedError, LoadError):
        raise
    except GlmError as error:
        raise LoadError("bad_model", str(error)) from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise LoadError("internal", f"{type(error).__name__}: {error}") from error
        raise LoadError(
            "out_of_memory",
            f"{device} has no memory for layers {assign.layer_start + 1}-{assign.layer_end} in {assign.precision}: "
            "give this stage fewer layers or a lower precision",
        ) from None


def _model_dir(assign: Assign, model: OwnModel | None) -> Path:
    if model is not None:
        return resolve_model(model.name, model.revision, logger.info)
    if not assign.model_path:
        return demo_model_dir()
    try:
        return resolve_model(assign.model_path, assign.model_revision, logger.info)
    except ModelNotFoundError as error:
        raise LoadError("bad_model", f"{error}; or say with the worker's --model where this host has it") from None


def _load_layers(assign: Assign, model_dir: Path, device: torch.device, progress: LoadProgress) -> LayerStack:
    precision = Precision.parse(assign.precision)
    config = load_config(model_dir)
    if assign.layer_end > config.num_layers:
        raise LoadError(
            "bad_request",
            f"layers {assign.layer_start + 1}-{assign.layer_end} were assigned, {model_dir} has {config.num_layers}",
        )
    checkpoint = open_checkpoint(model_dir)
    fingerprint = checkpoint.fingerprint()
    if assign.fingerprint not in ("", fingerprint):
        raise LoadError(
            "fingerprint_mismatch",
            f"{model_dir} is not the checkpoint the coordinator sees (fingerprint {fingerprint}, wanted "
            f"{assign.fingerprint}): put the same files in both places",
        )
    source = with_cache(checkpoint, config, precision, device)
    layers = LayerStack.load(source, config, assign.layer_start, assign.layer_end, precision, device, progress)
    if isinstance(source, CachedCheckpoint):
        _tell_about_cache(source, assign.layer_end - assign.layer_start)
    return layers


def _tell_about_cache(source: CachedCheckpoint, num_layers: int) -> None:
    logger.info("%d of %d layers were found quantised in %s", source.num_found, num_layers, source.directory)
    if source.complaint is not None:
        logger.warning(
            "quantised layers were not kept for the next time: %s; make room, name another disk with --cache-dir, or "
            "say --no-cache",
            source.complaint,
        )
