"""What a Pong says: written by the main thread as a whole, read by the control thread at any time."""

import torch

from protocol.control import Pong, WorkerState
from protocol.records import Record
from stage_worker.memory import moved_bytes, resident_bytes


class Status(Record, frozen=True):
    """A snapshot of the worker. `busy_s` and `num_steps` count since the assignment; `epoch` is 0 while idle."""

    state: WorkerState = "idle"
    epoch: int = 0
    busy_s: float = 0.0
    num_steps: int = 0
    kv_tokens: int = 0
    num_sequences: int = 0
    weight_bytes: int = 0

    def after_step(self, compute_s: float, kv_tokens: int, num_sequences: int) -> "Status":
        """The status after one more step, and what is held then."""
        busy_s, num_steps = self.busy_s + compute_s, self.num_steps + 1
        return Status(self.state, self.epoch, busy_s, num_steps, kv_tokens, num_sequences, self.weight_bytes)

    def pong(self, request_id: int, device: torch.device, num_taken: int = 0) -> Pong:
        """The answer to a Ping, `num_taken` steps having arrived; memory, and what was moved, are measured now."""
        return Pong(
            request_id,
            self.state,
            self.epoch,
            self.busy_s,
            self.num_steps,
            self.kv_tokens,
            self.num_sequences,
            self.weight_bytes,
            resident_bytes(device),
            num_taken,
            moved_bytes() if self.state == "loading" else 0,
        )
