"""Where a model is: a directory here, a model of a hub, fetched into huggingface_hub's own cache, or `random:SHAPE`.

The cache, the token, the endpoint and the offline mode are that library's (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE and the rest of its settings); this module only chooses the files and words the errors.
"""

import re
from pathlib import Path

from glm.errors import ModelNotFoundError
from glm.shapes import random_shape

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Exact names where that is possible: what another program has cached of a model should do without a network.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "*.jinja",
    "tokenizer.model",
    "ice_text.model",
)
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def resolve_model(name_or_dir: str | Path, revision: str | None = None) -> Path:
    """The directory that holds a model.

    A directory is taken as it is, and so is `random:SHAPE`, which needs none. Anything of the form `org/name` is looked
    up on the hub (at `revision`: a branch, tag or commit) and fetched as far as the cache lacks it: config, tokenizer,
    chat template and weights, of these the safetensors when there are any. Never code. What is cached is found without
    a network.

    Raises:
        ModelNotFoundError: says what was tried and what to do.
    """
    described = resolve_description(name_or_dir, revision)
    if _is_directory(name_or_dir) or random_shape(name_or_dir):
        return described
    name = str(name_or_dir)
    snapshot = _fetch(name, revision, _SAFETENSORS)
    if not any(snapshot.glob(_SAFETENSORS[0])):
        snapshot = _fetch(name, revision, _BIN)
    return snapshot


def resolve_description(name_or_dir: str | Path, revision: str | None = None) -> Path:
    """A directory with a model's config and tokenizer, of a hub's model before its weights are fetched.

    Raises:
        ModelNotFoundError: says what was tried and what to do.
    """
    name, directory = str(name_or_dir), Path(name_or_dir).expanduser()
    if random_shape(name):
        if revision is not None:
            raise ModelNotFoundError(f"{name} is made of random numbers and has no revision {revision!r}: leave it out")
        return Path(name)
    if _is_directory(name_or_dir):
        if revision is not None:
            raise ModelNotFoundError(f"{directory} is a directory, which has no revision {revision!r}: leave it out")
        return directory.absolute()
    if not _HUB_ID.fullmatch(name) or directory.exists():
        what = "a file, not a directory" if directory.is_file() else "no directory here"
        raise ModelNotFoundError(
            f"no model {name!r}: that is {what}, and not a hub id, which has the form org/name; check the spelling"
        )
    return _fetch(name, revision, ())


def _is_directory(name_or_dir: str | Path) -> bool:
    return bool(str(name_or_dir)) and Path(name_or_dir).expanduser().is_dir()


def _fetch(name: str, revision: str | None, weights: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            name, revision=revision, allow_patterns=[*SMALL_FILES, *weights], ignore_patterns="*/*"
        )
    except Exception as error:  # the library lets errors of its HTTP client, of the disk and its own through
        raise ModelNotFoundError(_complaint(name, revision, error)) from error
    return Path(snapshot).absolute()


def _complaint(name: str, revision: str | None, error: Exception) -> str:
    """What was tried, what the hub said and what to do about it."""
    from huggingface_hub import constants, errors

    tried = f"no model {name!r}: there is no such directory, and {constants.ENDPOINT}"
    at = f"revision {revision!r}" if revision else "the default revision"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{tried} asks for consent first: accept the terms on {constants.ENDPOINT}/{name}, then set HF_TOKEN to a "
            "token of that account (or run `hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{tried} has the model, but not {at}: name one of its branches, tags or commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{tried} has none of this name that you may see: check the spelling; a private model needs HF_TOKEN (or "
            "`hf auth login`)"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"no model {name!r}: there is no such directory, and {constants.HF_HUB_CACHE} does not hold all of {at}; "
            "HF_HUB_OFFLINE is set: unset it once to download, or give a directory"
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return (
        f"{tried} could not be asked for {at}, of which {constants.HF_HUB_CACHE} holds too little "
        f"({type(error).__name__}: {reason}): check the network, the proxy and HF_ENDPOINT, or give a directory"
    )
