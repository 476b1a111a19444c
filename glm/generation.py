"""What a model generates with when nobody says otherwise: its published defaults and its end ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm.config import ModelConfig
from glm.dialect import Dialect, detect_dialect
from glm.errors import ConfigError, SamplingError
from glm.json_file import read_json_object
from glm.sampling_params import SamplingParams
from glm.tokenizer import Tokenizer

# (max_length, temperature, top_p) of the published chat() of each dialect.
PUBLISHED = {
    "chatglm": (2048, 0.95, 0.7),
    "chatglm2": (8192, 0.8, 0.8),
    "chatglm3": (8192, 0.8, 0.8),
    "codegeex2": (8192, 0.8, 0.8),
    "glm4": (8192, 0.8, 0.8),
}
CHATGLM3_USER, CHATGLM3_OBSERVATION = 64795, 64797
CHATGLM_IMAGE_TOKENS = 20000


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds for an answer unless the user says otherwise."""

    max_length: int
    """Most tokens of prompt and answer together, never more than the model's context."""
    end_ids: tuple[int, ...]
    """Token ids that end an answer; none of them is part of it."""
    guard_id: int
    """The id that is chosen when a score is NaN or infinite, as the published code does."""
    sampling: SamplingParams


def generation_defaults(config: ModelConfig, model_dir: Path, tokenizer: Tokenizer | None = None) -> GenerationDefaults:
    """The published defaults of a model; for transformers' layouts those of its generation_config.json.

    `tokenizer`, where there is one, decides the dialect and knows the true ids of ChatGLM3's end tokens.

    Raises:
        ConfigError: generation_config.json is unreadable or has impossible values.
    """
    dialect = tokenizer.dialect if tokenizer is not None else detect_dialect(config, model_dir)
    if config.family in ("glm", "glm4"):
        return _transformers_defaults(config, model_dir)
    max_length, temperature, top_p = PUBLISHED.get(dialect, PUBLISHED["glm4"])
    return GenerationDefaults(
        max_length=min(max_length, config.max_context),
        end_ids=_end_ids(config, dialect, tokenizer),
        guard_id=_guard_id(config, dialect),
        sampling=SamplingParams(temperature=temperature, top_p=top_p),
    )


def _end_ids(config: ModelConfig, dialect: Dialect, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    ids = config.eos_ids
    if dialect == "chatglm3" and tokenizer is not None:
        ids += tuple(tokenizer.special[name] for name in ("<|user|>", "<|observation|>"))
    elif dialect == "chatglm3":
        ids += (CHATGLM3_USER, CHATGLM3_OBSERVATION)
    return tuple(token_id for token_id in dict.fromkeys(ids) if token_id < config.vocab_size)


def _guard_id(config: ModelConfig, dialect: Dialect) -> int:
    if dialect in ("glm4", "template"):
        guard_id = 198
    elif dialect == "chatglm" and config.vocab_size >= 150_000:
        guard_id = 5 + CHATGLM_IMAGE_TOKENS
    else:
        guard_id = 5
    return min(guard_id, config.vocab_size - 1)


def _transformers_defaults(config: ModelConfig, model_dir: Path) -> GenerationDefaults:
    path = model_dir / "generation_config.json"
    raw = read_json_object(path, ConfigError)
    eos = raw.get("eos_token_id", list(config.eos_ids))
    end_ids = eos if isinstance(eos, list) else [eos]
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < config.vocab_size for i in end_ids):
        raise ConfigError(f"{path}: eos_token_id is {eos!r}, it must be a token id below {config.vocab_size} or a list")
    max_length = raw.get("max_length", config.max_context)
    if not isinstance(max_length, int) or max_length <= 0:
        raise ConfigError(f"{path}: max_length is {max_length!r}, it must be a positive whole number")
    return GenerationDefaults(
        max_length=min(max_length, config.max_context),
        end_ids=tuple(dict.fromkeys(end_ids)),
        guard_id=_guard_id(config, "template"),
        sampling=_sampling_of(raw, path),
    )


def _sampling_of(raw: Mapping[str, Any], path: Path) -> SamplingParams:
    """What the file says; without the file GLM-4's defaults, which models in this layout were published with."""
    if not raw:
        _, temperature, top_p = PUBLISHED["glm4"]
        return SamplingParams(temperature=temperature, top_p=top_p)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        return SamplingParams(**given, greedy=raw.get("do_sample", True) is False)
    except SamplingError as error:
        raise ConfigError(f"{path}: {error}") from error
