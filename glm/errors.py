"""What can be wrong with a model, from a user's point of view.

    GlmError
    ├── ConfigError               config.json is missing, unreadable, unsupported or impossible
    ├── ModelNotFoundError        neither a directory nor a model a hub has
    │   └── HubError              the hub did not answer, or there is no room; may go well another time
    ├── PrecisionError            a precision that is unknown, or that this device or shape cannot have
    ├── CheckpointError           the weights are not what config.json promises
    │   ├── LfsPointerError       a Git-LFS pointer file lies where weights should be
    │   ├── ManifestError         the list of a converted model's files is damaged, of another version or hostile
    │   ├── ShardError            a shard is missing, truncated or unreadable
    │   ├── MissingTensorError    a tensor that the layout needs is in no shard
    │   └── TensorShapeError      a tensor has another shape than config.json implies
    ├── ConversionError           a model cannot be converted, or not into this directory
    │   └── DiskSpaceError        the disk is too small for the result
    ├── MissingKernelsError       faster arithmetic cannot be had here; torch's is used instead
    ├── CacheGapError             a segment starts beyond the cached tokens
    ├── SegmentError              segments that cannot be computed together, or cut a prompt that must stay whole
    ├── TokenizerError            tokenizer files are missing or broken
    │   └── NoTokenizerError      there are none, so that the model can only be given token ids
    ├── ChatFormatError           a conversation that the model's chat format has no place for
    └── SamplingError             sampling params with impossible values

Every message names the culprit, the number and the remedy, and is meant to be shown as it is.
"""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager


class GlmError(Exception):
    """Root of all errors of this package."""


class ConfigError(GlmError):
    """config.json is missing, unreadable, unsupported or impossible."""


class ModelNotFoundError(GlmError):
    """The model is neither a directory here nor available from a hub."""


class HubError(ModelNotFoundError):
    """The hub did not answer, or what it sends has no room: it was tried, and may go well another time."""


class PrecisionError(GlmError):
    """A precision that is unknown, or that this device or shape cannot have."""


class CheckpointError(GlmError):
    """The weights on disk are not what config.json promises."""


class LfsPointerError(CheckpointError):
    """A Git-LFS pointer file lies where weights should be."""


class ManifestError(CheckpointError):
    """The list of a converted model's files is damaged, of another version or hostile."""


class ShardError(CheckpointError):
    """A shard is missing, truncated or unreadable."""


class MissingTensorError(CheckpointError):
    """A tensor that the layout needs is in no shard."""


class TensorShapeError(CheckpointError):
    """A tensor has another shape than config.json implies."""


class ConversionError(GlmError):
    """A model that cannot be converted, or not into this directory."""


class DiskSpaceError(ConversionError):
    """The disk is too small for what is to be written."""


class MissingKernelsError(GlmError):
    """Faster arithmetic cannot be had here: what is missing, and the remedy. Torch's is used instead."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{textwrap.shorten(what, 140)}: {remedy}")


class CacheGapError(GlmError):
    """A segment starts beyond the tokens that the cache holds."""


class SegmentError(GlmError):
    """Segments that cannot be computed together, or that cut a prompt that must stay whole."""


class TokenizerError(GlmError):
    """Tokenizer files are missing or broken."""


class NoTokenizerError(TokenizerError):
    """The model directory has no tokenizer file: the model can only be given token ids."""


class ChatFormatError(GlmError):
    """A conversation that the model's chat format has no place for."""


class SamplingError(GlmError):
    """Sampling params with impossible values."""


@contextmanager
def faults_as(kind: type[Exception], what: str) -> Iterator[None]:
    """At the border to a library: whatever it raises in this block becomes a `kind` that says `what` failed.

    That includes the panics of libraries written in Rust, which are no ordinary exceptions: one request's fault must
    not end a program that serves others. Errors that say already what is wrong pass as they are.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, GlmError, kind):
        raise
    except BaseException as error:
        raise kind(f"{what}: {textwrap.shorten(str(error), 300) or type(error).__name__}") from error
