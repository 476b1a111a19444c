"""Control plane: coordinator ROUTER <-> worker DEALER. A reply repeats its request's `request_id`; 0 is unsolicited."""

from typing import Annotated, Literal

from msgspec import Meta

from protocol.errors import MessageError
from protocol.limits import (
    Bytes,
    Count,
    Id,
    Index,
    Name,
    PathText,
    PositiveCount,
    PositiveSeconds,
    Seconds,
    Text,
    Total,
)
from protocol.records import Record

WorkerState = Literal["idle", "loading", "serving"]
InspectedPart = Literal["hidden", "key", "value"]
ControlFailureCode = Literal[
    "bad_model", "fingerprint_mismatch", "out_of_memory", "unreachable", "bad_request", "internal"
]
"""`bad_model`: the checkpoint cannot be served (text says why). `unreachable`: the next hop's address is refused.
`bad_request`: not possible in this state, or names what is not there. `internal`: a bug of the worker."""


class HostModel(Record, frozen=True):
    """What a worker's host was told to load, whatever the coordinator calls it."""

    name: PathText
    fingerprint: Name
    num_layers: PositiveCount


class Join(Record, frozen=True):
    """Worker -> coordinator, first message: who I am, what I have. `data_endpoint` is where my PULL listens.

    `public_key` is this process's own on the data plane; `is_guarded` says that its PULL demands keys. `token` lets the
    key that the connection was made with be allowed, once. `model` None: whichever is assigned.
    """

    request_id: Id
    worker_id: Name
    glmpipe_version: Name
    torch_version: Name
    host: Name
    pid: Count
    device: Name
    device_name: Name
    memory_total_bytes: Bytes
    memory_free_bytes: Bytes
    num_threads: PositiveCount
    kernels: Annotated[tuple[Name, ...], Meta(max_length=64)]
    data_endpoint: Name
    public_key: Name
    is_guarded: bool
    token: Name | None
    model: HostModel | None


class Welcome(Record, frozen=True):
    """Coordinator -> worker: joined. A worker that hears nothing for `orphan_timeout_s` has lost this coordinator.

    `coordinator_id` differs between any two launches. A spare has no stage until another worker is lost.
    """

    request_id: Id
    coordinator_id: Name
    heartbeat_interval_s: PositiveSeconds
    orphan_timeout_s: PositiveSeconds
    is_spare: bool


class Refused(Record, frozen=True):
    """Coordinator -> worker: not joined, or no longer, and why. It leaves, but
    after `no_seat` it may ask again later, after `lost` at once."""

    request_id: Id
    code: Name
    text: Text


class Assign(Record, frozen=True):
    """Coordinator -> worker: become stage `stage_index` of `num_stages` with layers [layer_start, layer_end), 0-based.

    `model_path`: a directory or whatever else names a model; empty is the one that comes along. `next_public_key` None:
    the next hop's PULL demands no keys. `previous_public_key`: the one that may connect to a guarded PULL.
    `kv_budget_tokens` bounds the sum of all sequences' cached tokens. `activation_dtype` None: hidden states leave in
    the stage's compute dtype. `record_hidden_states` keeps every layer's output per sequence, for Inspect.
    """

    request_id: Id
    epoch: Id
    stage_index: Index
    num_stages: PositiveCount
    model_path: PathText
    model_revision: Name | None
    fingerprint: Name
    layer_start: Index
    layer_end: PositiveCount
    precision: Name
    kv_budget_tokens: PositiveCount
    next_endpoint: Name
    next_public_key: Name | None
    previous_public_key: Name | None
    activation_dtype: Literal["float32", "float16", "bfloat16"] | None
    record_hidden_states: bool

    def __post_init__(self) -> None:
        if self.epoch == 0:
            raise MessageError("epoch 0 means that nothing is assigned")
        if self.layer_start >= self.layer_end:
            raise MessageError(f"layers [{self.layer_start}, {self.layer_end}) are empty")
        if self.stage_index >= self.num_stages:
            raise MessageError(f"stage {self.stage_index} of {self.num_stages} stages")


class Progress(Record, frozen=True):
    """Worker -> coordinator while loading, `request_id` 0; `weight_bytes` held so far."""

    request_id: Id
    epoch: Id
    layers_done: Count
    layers_total: Count
    weight_bytes: Bytes


class Ready(Record, frozen=True):
    """Answer to Assign: serving. `resident_bytes`: RSS of the process, on a GPU the memory reserved there."""

    request_id: Id
    epoch: Id
    weight_bytes: Bytes
    resident_bytes: Bytes
    load_s: Seconds
    kernel_path: Name


class Failed(Record, frozen=True):
    """Answer to Assign or Inspect that could not be done; the worker stays joined."""

    request_id: Id
    epoch: Id
    code: ControlFailureCode
    text: Text


class Ping(Record, frozen=True):
    """Coordinator -> worker: alive? Answered at once in every state."""

    request_id: Id


class Pong(Record, frozen=True):
    """Answer to Ping. `busy_s`: seconds computing and `num_steps` done since Assign; `epoch` 0 while idle.

    `num_taken`: steps that have arrived since Assign; one more than were done while one is computed. `moved_bytes`:
    what the process has read and written while it loads, by which a slow disk is told from a dead one; otherwise 0.
    """

    request_id: Id
    state: WorkerState
    epoch: Id
    busy_s: Seconds
    num_steps: Total
    kv_tokens: Total
    num_sequences: Count
    weight_bytes: Bytes
    resident_bytes: Bytes
    num_taken: Total
    moved_bytes: Bytes


class Inspect(Record, frozen=True):
    """Coordinator -> worker: what a layer (0-based, of the whole model) holds for a sequence, from `start_pos` on."""

    request_id: Id
    sequence_id: Id
    layer: Index
    what: InspectedPart
    start_pos: Index


class Inspected(Record, frozen=True):
    """Answer to Inspect, with one float32 tensor: as many of the `num_tokens` there are as MAX_INSPECTED_BYTES hold.

    hidden: [tokens, hidden_size]; key, value: [tokens, kv_heads, head_dim].
    """

    request_id: Id
    epoch: Id
    sequence_id: Id
    layer: Index
    what: InspectedPart
    start_pos: Index
    num_tokens: Count


class Release(Record, frozen=True):
    """Coordinator -> worker: give up weights and caches, be idle again."""

    request_id: Id
    epoch: Id


class Released(Record, frozen=True):
    """Answer to Release: `freed_bytes` is how far the worker's resident memory fell."""

    request_id: Id
    epoch: Id
    freed_bytes: Bytes


class Shutdown(Record, frozen=True):
    """Coordinator -> worker: leave. Answered with Leaving."""

    request_id: Id
    reason: Text


class Leaving(Record, frozen=True):
    """Either way, last message: goodbye, and why. A worker of another host then waits for the next coordinator."""

    request_id: Id
    reason: Text


ControlMessage = (
    Join
    | Welcome
    | Refused
    | Assign
    | Progress
    | Ready
    | Failed
    | Ping
    | Pong
    | Inspect
    | Inspected
    | Release
    | Released
    | Shutdown
    | Leaving
)
