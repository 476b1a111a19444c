"""What makes a model answer as it does, so that answers of another one are not taken for its own."""

from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.plan import Plan, layers_text
from protocol.client import Description
from protocol.limits import MAX_NAME, clip_text

if TYPE_CHECKING:
    from coordinator.model_text import ModelText
    from glm.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model's name, its files, at which precision each part is held, and how conversations are written for it."""

    name: str
    fingerprint: str
    precision: str
    chat_format: str

    def as_json(self) -> dict[str, Any]:
        """As a line of a file of answers has it."""
        return asdict(self)

    def differences(self, other: "ModelIdentity") -> list[str]:
        """What would answer otherwise, in words: `int8 instead of fp32`. The name is only a name."""
        kinds = {"fingerprint": "files", "precision": "precision", "chat_format": "chat format"}
        return [
            f"{kind} {getattr(self, field)} instead of {getattr(other, field)}"
            for field, kind in kinds.items()
            if getattr(self, field) != getattr(other, field)
        ]


def identity_of(
    model_dir: Path, config: "ModelConfig", plan: Plan, text: "ModelText", fingerprint: str
) -> ModelIdentity:
    """That of a model which a plan is for, and whose weights have this fingerprint."""
    return ModelIdentity(
        name=clip_text(config.name or model_dir.name, MAX_NAME),
        fingerprint=fingerprint,
        precision=clip_text(precision_text(plan)),
        chat_format=text.found.dialect if text.found is not None else "",
    )


def identity_in(description: Description) -> ModelIdentity:
    """That of whatever answers."""
    return ModelIdentity(
        description.model_name, description.fingerprint, description.precision, description.chat_format
    )


def precision_text(plan: Plan) -> str:
    """`int8, lm_head int8, ...`: wherever stages begin and end, and on whatever devices, the same have one text."""
    runs = [(precision, list(stages)) for precision, stages in groupby(plan.stages, key=lambda stage: stage.precision)]
    parts = [
        precision if len(runs) == 1 else f"{precision} {layers_text(stages[0].layer_start, stages[-1].layer_end)}"
        for precision, stages in runs
    ]
    ends = plan.ends
    named = (
        ("embeddings", ends.embedding_precision),
        ("final_layernorm", ends.final_layernorm_precision),
        ("lm_head", ends.lm_head_precision),
    )
    return ", ".join((*parts, *(f"{part} {precision}" for part, precision in named)))
