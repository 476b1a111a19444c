"""One sequence as a stage holds it: its KV cache and, when asked for, every layer's output."""

import torch

from glm.kv_cache import SequenceCache


class StageSequence:
    """A cache, and the recorded hidden states of exactly the cached tokens (none unless recording is on)."""

    def __init__(self, cache: SequenceCache, recorded: list[torch.Tensor] | None = None) -> None:
        self.cache = cache
        self._recorded = recorded or []

    @property
    def length(self) -> int:
        """Tokens cached."""
        return self.cache.length

    def record(self, layer_outputs: torch.Tensor) -> None:
        """Remember new tokens' float32 hidden states, [num_layers, num_tokens, hidden_size]."""
        self._recorded.append(layer_outputs)

    def recorded(self) -> torch.Tensor | None:
        """float32 [num_layers, length, hidden_size], None if nothing was recorded."""
        return torch.cat(self._recorded, dim=1) if self._recorded else None

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, at most those cached."""
        if length == self.length:
            return
        self.cache.truncate(length)
        self._recorded = self._first_recorded(length)

    def fork(self, length: int) -> "StageSequence":
        """An independent sequence with the same first `length` tokens, at most those cached."""
        return StageSequence(self.cache.fork(length), self._first_recorded(length))

    def _first_recorded(self, length: int) -> list[torch.Tensor]:
        recorded = self.recorded()
        return [] if recorded is None or length == 0 else [recorded[:, :length].clone()]
