"""What kernels of any device may do between products: norm, gate and rotation, each in one pass over the tokens."""

from typing import Protocol

import torch


class StepKernels(Protocol):
    """The same calls on every device, for tensors that `can_step` accepts."""

    def can_step(self, example: torch.Tensor) -> bool:
        """Whether they compute with tensors of this dtype on this device."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[num_tokens, size] -> the same: `norm.RMSNorm`."""

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, 2 * size] -> [num_tokens, size]: SiLU of the first half times the second."""

    def rotate(self, x: torch.Tensor, num_heads: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate neighbours in the first heads of x [num_tokens, more heads, head_dim], in place."""
