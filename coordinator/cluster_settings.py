"""What a cluster is told, and what it tells while it loads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from protocol.control import Ready
from protocol.key_files import KeyDirectory

AWAIT_WORKER_S = 60.0
"""A worker that its service manager starts again is back in some 15 s, a rebooting switch in 30 to 50 s. Whoever reads
an answer will hardly wait for longer."""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far one stage has loaded; `ready` is set once, when it serves."""

    stage_index: int
    layers_done: int
    layers_total: int
    weight_bytes: int
    ready: Ready | None = None


ProgressSink = Callable[[StageProgress], None]


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What every stage is told: the model, the epoch, the KV budget of stages that state none themselves.

    Of a hub's model that is not here yet `model_dir` has no weights, and `fingerprint` is empty, which is not compared.
    `model_name` and `revision` are what other hosts find the model by; an empty name is the model that comes along.
    """

    model_dir: Path
    fingerprint: str
    epoch: int
    default_kv_budget_tokens: int
    record_hidden_states: bool = False
    model_name: str = ""
    revision: str | None = None
    hidden_size: int | None = None
    """Of the model: with it, the way through all stages is tried by an empty step once they are ready."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where other hosts reach this one, `tcp://ADDR:PORT`, and the keys by which they know each other."""

    endpoint: str
    keys: KeyDirectory
    await_worker_s: float = AWAIT_WORKER_S
    """How long a lost worker of another host is awaited before a spare takes its place, or the requests fail."""
    shows_tokens: bool = False
    """Whether join tokens may be among the notes, as for a terminal; otherwise they are in files of the launch."""
