"""The two norms, computed in fp32 whatever the dtype of their input."""

import torch
from torch.nn import functional

from glm.kernels.step import StepKernels


class LayerNorm:
    """ChatGLM-6B: mean and variance, weight and bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.weight, self.bias, self.eps = weight, bias, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm:
    """Later families: mean of squares, weight only; eps inside the root."""

    def __init__(self, weight: torch.Tensor, eps: float, kernels: StepKernels | None = None) -> None:
        self.weight, self.eps = weight, eps
        self._kernels = kernels if kernels is not None and kernels.can_step(weight) else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


Norm = LayerNorm | RMSNorm
