"""What a user asked for, in the user's own words: unchecked, so that all faults can be told at once."""

from dataclasses import dataclass

from coordinator.plan import Plan


@dataclass(frozen=True, slots=True)
class Option:
    """A value and the place it came from (`--embeddings`, `[ends] embeddings`), to name it in a fault."""

    origin: str
    text: str


@dataclass(frozen=True, slots=True)
class StageRequest:
    """A wished stage. `layers` is `1-12`, `5`, `13-` or `all`, counted from 1; `kv_budget` a size, such as `2GiB`."""

    origin: str
    device: str
    layers: str
    precision: str | None = None
    num_threads: int | None = None
    kv_budget_tokens: int | None = None
    kv_budget: str | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A wished plan. Without stages, all layers go to `num_stages` (or one) CPU stages, evenly.

    `num_threads`, `kv_budget_tokens` and `kv_budget` are for each stage that has none of its own.

    `default_precision` and `default_head_precision` are what the model was converted to, None for any other.
    `model` and `revision` are what a plan file names, None when it leaves them to the command line.
    `faults` are those already found while reading; `resolve` lists them with its own. `is_complete` is false
    when a stage was too malformed to be kept in `stages`: gaps between the others then mean nothing.
    """

    stages: tuple[StageRequest, ...] = ()
    num_stages: int | None = None
    num_threads: int | None = None
    kv_budget_tokens: int | None = None
    kv_budget: str | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    prefill_chunk: int | None = None
    gpu_precision: Option | None = None
    cpu_precision: Option | None = None
    embeddings: Option | None = None
    final_layernorm: Option | None = None
    lm_head: Option | None = None
    ends_precision: Option | None = None
    lm_head_precision: Option | None = None
    default_precision: str | None = None
    default_head_precision: str | None = None
    model: str | None = None
    revision: str | None = None
    faults: tuple[str, ...] = ()
    is_complete: bool = True


def request_of(plan: Plan) -> PlanRequest:
    """The request that a plan built by hand amounts to, so that it passes the same checks."""
    ends = plan.ends
    stages = tuple(
        StageRequest(
            origin=f"stage {number}",
            device=stage.device,
            layers=f"{stage.layer_start + 1}-{stage.layer_end}",
            precision=stage.precision,
            num_threads=stage.num_threads,
            kv_budget_tokens=stage.kv_budget_tokens,
            host=stage.host,
        )
        for number, stage in enumerate(plan.stages, start=1)
    )
    return PlanRequest(
        stages=stages,
        embeddings=Option("embedding_device", ends.embedding_device),
        final_layernorm=Option("final_layernorm_device", ends.final_layernorm_device),
        lm_head=Option("lm_head_device", ends.lm_head_device),
        ends_precision=Option("embedding_precision", ends.embedding_precision),
        lm_head_precision=Option("lm_head_precision", ends.lm_head_precision),
        max_num_seqs=plan.max_num_seqs,
        max_model_len=plan.max_model_len,
        prefill_chunk=plan.prefill_chunk,
        faults=() if plan.stages else ("a plan needs at least one stage",),
    )
