"""What a stage is told to become."""

from collections.abc import Sequence

from coordinator.cluster_settings import ClusterSettings
from coordinator.pipeline import Pipeline
from coordinator.plan import Plan
from protocol.control import Assign, Join


def assignment(
    index: int, plan: Plan, settings: ClusterSettings, kv_budget_tokens: int, joins: Sequence[Join], pipeline: Pipeline
) -> Assign:
    """For the stage of this index; `joins` say where each stage listens, `pipeline` where the outcomes are awaited."""
    stage = plan.stages[index]
    if index == len(plan.stages) - 1:
        next_endpoint = pipeline.return_endpoint
        next_key = pipeline.keys.public if pipeline.is_guarded else None
    else:
        following = joins[index + 1]
        next_endpoint = following.data_endpoint
        next_key = following.public_key if following.is_guarded else None
    return Assign(
        request_id=0,
        epoch=settings.epoch,
        stage_index=index,
        num_stages=len(plan.stages),
        model_path=str(settings.model_dir) if stage.host is None else settings.model_name,
        model_revision=None if stage.host is None else settings.revision,
        fingerprint=settings.fingerprint,
        layer_start=stage.layer_start,
        layer_end=stage.layer_end,
        precision=stage.precision,
        kv_budget_tokens=kv_budget_tokens,
        next_endpoint=next_endpoint,
        next_public_key=next_key,
        previous_public_key=pipeline.keys.public if index == 0 else joins[index - 1].public_key,
        activation_dtype=None,
        record_hidden_states=settings.record_hidden_states,
    )
