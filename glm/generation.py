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

# (temperature, top_p) of the published chat() of each dialect. Its max_length, 8192 for models of any context, is a
# habit of that function and no bound of theirs.
PUBLISHED = {
    "chatglm": (0.95, 0.7),
    "chatglm2": (0.8, 0.8),
    "chatglm3": (0.8, 0.8),
    "codegeex2": (0.8, 0.8),
    "glm4": (0.8, 0.8),
}
TOP_K = 50
"""What transformers takes where generation_config.json says nothing of it."""
CHATGLM3_USER, CHATGLM3_OBSERVATION = 64795, 64797
CHATGLM_IMAGE_TOKENS = 20000


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds for an answer unless the user says otherwise."""

    max_length: int
    """Most tokens of prompt and answer together: of generation_config.json, else and at most the model's context."""
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
    path = model_dir / "generation_config.json"
    if config.family in ("glm", "glm4"):
        return _transformers_defaults(config, path)
    temperature, top_p = PUBLISHED.get(dialect, PUBLISHED["glm4"])
    return GenerationDefaults(
        max_length=_max_length(_said(path), path, config),
        end_ids=_end_ids(config, dialect, tokenizer),
        guard_id=_guard_id(config, dialect),
        sampling=SamplingParams(temperature=temperature, top_p=top_p),
    )


def _said(path: Path) -> dict[str, Any]:
    """What the file says; null says nothing."""
    return {key: value for key, value in read_json_object(path, ConfigError).items() if value is not None}


def _max_length(said: Mapping[str, Any], path: Path, config: ModelConfig) -> int:
    max_length = said.get("max_length", config.max_context)
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length <= 0:
        raise ConfigError(f"{path}: max_length is {max_length!r}, it must be a positive whole number")
    return min(max_length, config.max_context)


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


def _transformers_defaults(config: ModelConfig, path: Path) -> GenerationDefaults:
    said = _said(path)
    eos = said.get("eos_token_id", list(config.eos_ids))
    end_ids = eos if isinstance(eos, list) else [eos]
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < config.vocab_size for i in end_ids):
        raise ConfigError(f"{path}: eos_token_id is {eos!r}, it must be a token id below {config.vocab_size} or a list")
    return GenerationDefaults(
        max_length=_max_length(said, path, config),
        end_ids=tuple(dict.fromkeys(end_ids)),
        guard_id=_guard_id(config, "template"),
        sampling=_sampling_of(said, path),
    )


def _sampling_of(said: Mapping[str, Any], path: Path) -> SamplingParams:
    """As transformers reads the file, which is greedily where do_sample is not true.

    Without the file GLM-4's defaults, which models in this layout were published with.
    """
    if not path.is_file():
        temperature, top_p = PUBLISHED["glm4"]
        return SamplingParams(temperature=temperature, top_p=top_p)
    do_sample = said.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise ConfigError(f"{path}: do_sample is {do_sample!r}, it must be true or false")
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    given = {"top_k": TOP_K, **{name: said[name] for name in names if name in said}}
    try:
        return SamplingParams(**given, greedy=not do_sample)
    except SamplingError as error:
        raise ConfigError(f"{path}: {error}") from error
