"""Where a model is: a directory here, a model of a hub, fetched into huggingface_hub's own cache, or `random:SHAPE`.

The cache, the token, the endpoint and the offline mode are that library's (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE and the rest of its settings); this module chooses the files. What the cache has is used as it is, and no
hub is asked: a branch stays at the commit that was fetched.
"""

import re
from pathlib import Path

from glm.errors import CheckpointError, ModelNotFoundError
from glm.foreign_model import AS_PUBLISHED
from glm.home import expanded
from glm.hub_fetch import Tell, at, complaint, fetch
from glm.json_file import read_json_object
from glm.shapes import random_shape
from glm.small_file import is_open

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Exact names where that is possible: what another program has cached of a model should do without a network.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.jinja",
    "tokenizer.model",
    "ice_text.model",
)
_SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
_BIN = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "ice_text.model")


def resolve_model(name_or_dir: str | Path, revision: str | None = None, tell: Tell = lambda _: None) -> Path:
    """The directory that holds a model.

    A directory is taken as it is, and so is `random:SHAPE`, which needs none. Anything of the form `org/name` is looked
    up in the hub's cache (at `revision`: a branch, tag or commit), and what that lacks is fetched: config, tokenizer,
    chat template and weights, of these the safetensors when there are any. Never code. `tell` receives lines that say
    whom it asks and how far it is.

    Raises:
        ModelNotFoundError: says what was tried and what to do.
    """
    found = find_model(name_or_dir, revision)
    if found is not None:
        return found
    description = resolve_description(name_or_dir, revision, tell)
    return _fetch(str(name_or_dir), _commit(description) or revision, tell, with_weights=True)


def find_model(name_or_dir: str | Path, revision: str | None = None) -> Path | None:
    """As `resolve_model`, asking nobody: None where something would have to be fetched.

    Raises:
        ModelNotFoundError: it is nothing that could be.
    """
    local = _local(name_or_dir, revision)
    return _cached(str(name_or_dir), revision, with_weights=True) if local is None else local


def resolve_description(name_or_dir: str | Path, revision: str | None = None, tell: Tell = lambda _: None) -> Path:
    """A directory with a model's config and tokenizer, of a hub's model before its weights are fetched.

    Raises:
        ModelNotFoundError: says what was tried and what to do.
    """
    found = _local(name_or_dir, revision) or _cached(str(name_or_dir), revision, with_weights=False)
    return found or _fetch(str(name_or_dir), revision, tell, with_weights=False)


def is_directory(name_or_dir: str | Path) -> bool:
    """Whether a model's name is that of a directory here.

    Raises:
        ModelNotFoundError: nobody can tell, as a directory on the way to it cannot be searched, or it cannot be read.
    """
    if not str(name_or_dir):
        return False
    path = expanded(name_or_dir)
    try:
        if not path.is_dir():
            return False
        if not is_open(path):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        raise ModelNotFoundError(
            f"{path} cannot be looked into ({error.strerror or error}): check its permissions and those of the "
            "directories above it"
        ) from error
    return True


def _local(name_or_dir: str | Path, revision: str | None) -> Path | None:
    """A directory or a random shape; None for what has the form of a hub's model. Raises ModelNotFoundError."""
    name, directory = str(name_or_dir), expanded(name_or_dir)
    if random_shape(name):
        if revision is not None:
            raise ModelNotFoundError(f"{name} is made of random numbers and has no revision {revision!r}: leave it out")
        return Path(name)
    if is_directory(name_or_dir):
        if revision is not None:
            raise ModelNotFoundError(f"{directory} is a directory, which has no revision {revision!r}: leave it out")
        return directory.absolute()
    if not HUB_ID.fullmatch(name) or directory.exists():
        what = "a file, not a directory" if directory.is_file() else "no directory here"
        if directory.suffix.lower() in (".gguf", ".ggml"):
            raise ModelNotFoundError(
                f"no model {name!r}: that is {what}, in {directory.suffix[1:].upper()}; {AS_PUBLISHED}"
            )
        raise ModelNotFoundError(
            f"no model {name!r}: that is {what}, and not a hub id, which has the form org/name; check the spelling"
        )
    return None


def _cached(name: str, revision: str | None, *, with_weights: bool) -> Path | None:
    """The directory of the hub's cache, if all is there that is needed. Raises ModelNotFoundError: it has no place."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_CACHE.startswith("~"):
        raise ModelNotFoundError(f"{name} has no place: no home directory is known (HOME is unset); set HF_HOME to one")
    for weights in (_SAFETENSORS, _BIN) if with_weights else ((),):
        try:
            snapshot = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=[*SMALL_FILES, *weights],
                    ignore_patterns="*/*",
                    local_files_only=True,
                )
            )
        except (OSError, ValueError):  # not all of it is there, as far as the library can tell
            continue
        if _is_described(snapshot) and (not weights or _has_weights(snapshot, weights[1])):
            return snapshot.absolute()
    return None


def _is_described(snapshot: Path) -> bool:
    """Whether config and tokenizer are there; a list of files that the library keeps says it better than we can."""
    is_listed = (snapshot.parents[1] / "trees" / f"{snapshot.name}.json").is_file()
    has_tokenizer = is_listed or any((snapshot / name).is_file() for name in _TOKENIZERS)
    return has_tokenizer and (snapshot / "config.json").is_file()


def _has_weights(snapshot: Path, index_name: str) -> bool:
    """Whether the one file of weights, or all that the index names, are there."""
    if not (snapshot / index_name).is_file():
        return (snapshot / index_name.removesuffix(".index.json")).is_file()
    try:
        weight_map = read_json_object(snapshot / index_name, CheckpointError).get("weight_map")
    except CheckpointError:
        return True  # whoever opens it says what is wrong
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    return all((snapshot / Path(name).name).is_file() for name in names)


def _fetch(name: str, revision: str | None, tell: Tell, *, with_weights: bool) -> Path:
    from huggingface_hub import constants

    try:
        if constants.HF_HUB_OFFLINE:
            raise ModelNotFoundError(complaint(name, at(revision), "offline", ""))
        return fetch(name, revision, SMALL_FILES, (_SAFETENSORS, _BIN) if with_weights else (), tell)
    except ModelNotFoundError as error:
        found = _partly_cached(name, revision, with_weights=with_weights)
        if found is None:
            raise
        tell(f"{error}. What {found} has is taken")
        return found


def _partly_cached(name: str, revision: str | None, *, with_weights: bool) -> Path | None:
    """What another program has cached of a model, if that is its config at least, and all weights where they count."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except (OSError, ValueError):  # no such id can be, or the cache cannot be read
        return None
    if not isinstance(found, str):
        return None
    snapshot = Path(found).parent.absolute()
    is_enough = not with_weights or any(_has_weights(snapshot, index) for _, index in (_SAFETENSORS, _BIN))
    return snapshot if is_enough else None


def _commit(snapshot: Path) -> str | None:
    """The commit that a directory of the hub's cache is of, so that all files are of the same one."""
    return snapshot.name if snapshot.parent.name == "snapshots" else None
