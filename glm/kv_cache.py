"""The keys and values of one sequence in one range of layers; grows as the sequence grows."""

from array import array

import torch

from glm.errors import CacheGapError

_GROWTH_TOKENS = 128


class SequenceCache:
    """Keys (after rotation) and values of one sequence, a pair of tensors for each layer of the range.

    Each tensor is [num_kv_heads, capacity, head_dim], of which the first `length` tokens count. A step writes its new
    tokens beyond `length` and then commits: a step that fails half-way changes nothing.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length = 0
        self.capacity = 0
        self._shape = (num_kv_heads, head_dim)
        empty = torch.empty(num_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self._keys = [empty] * num_layers
        self._values = [empty] * num_layers
        self._places: array[int] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held, reserved but unused tokens included."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def key(self, layer: int) -> torch.Tensor:
        """[length, num_kv_heads, head_dim], a view; `layer` counts from the start of the range."""
        return self._keys[layer][:, : self.length].transpose(0, 1)

    def value(self, layer: int) -> torch.Tensor:
        """[length, num_kv_heads, head_dim], a view."""
        return self._values[layer][:, : self.length].transpose(0, 1)

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` in all; grows by half so that appending stays cheap."""
        if num_tokens <= self.capacity:
            return
        capacity = max(num_tokens, self.capacity + self.capacity // 2)
        capacity = -(-capacity // _GROWTH_TOKENS) * _GROWTH_TOKENS
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                new = old.new_empty(self._shape[0], capacity, self._shape[1])
                new[:, : self.length] = old[:, : self.length]
                tensors[layer] = new
        self.capacity, self._places = capacity, None

    def places_from(self, layer: int) -> int:
        """The address of the addresses of keys and values of this and each later layer; good until `reserve`."""
        if self._places is None:
            tensors = zip(self._keys, self._values, strict=True)
            self._places = array("Q", [tensor.data_ptr() for pair in tensors for tensor in pair])
        return self._places.buffer_info()[0] + 2 * layer * self._places.itemsize

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [num_new, num_kv_heads, head_dim] behind the committed tokens (room must be reserved).

        Returns keys and values, each [num_kv_heads, length + num_new, head_dim], as views.
        """
        end = self.length + key.shape[0]
        keys, values = self._keys[layer], self._values[layer]
        keys[:, self.length : end] = key.transpose(0, 1)
        values[:, self.length : end] = value.transpose(0, 1)
        return keys[:, :end], values[:, :end]

    def tensors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer with all their room, each [num_kv_heads, capacity, head_dim]."""
        return self._keys[layer], self._values[layer]

    def commit(self, num_new: int) -> None:
        """Count the tokens written since the last commit."""
        self.length += num_new

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on.

        Raises:
            CacheGapError: fewer tokens than that are cached.
        """
        if not 0 <= length <= self.length:
            raise CacheGapError(f"cannot truncate to {length} tokens: {self.length} are cached")
        self.length = length

    def fork(self, length: int) -> "SequenceCache":
        """An independent copy of the first `length` tokens.

        Raises:
            CacheGapError: fewer tokens than that are cached.
        """
        if not 0 <= length <= self.length:
            raise CacheGapError(f"cannot fork at {length} tokens: {self.length} are cached")
        dtype, device = self._keys[0].dtype, self._keys[0].device
        copy = SequenceCache(len(self._keys), self._shape[0], self._shape[1], dtype, device)
        copy.reserve(length)
        for layer in range(len(self._keys)):
            copy.write(layer, self.key(layer)[:length], self.value(layer)[:length])
        copy.commit(length)
        return copy
