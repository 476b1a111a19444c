"""The precisions a range of layers can be held at, and the arithmetic that goes with each."""

from enum import StrEnum

import torch

from glm.config import ModelConfig
from glm.errors import PrecisionError


class Precision(StrEnum):
    """How weights are held in memory."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"

    @classmethod
    def parse(cls, text: str) -> "Precision":
        """Raises PrecisionError for anything but the five names."""
        try:
            return cls(text)
        except ValueError:
            names = ", ".join(p.value for p in cls)
            raise PrecisionError(f"precision {text!r} is unknown; choose one of {names}") from None

    @property
    def bits(self) -> int:
        """Bits a weight takes, scales not counted."""
        return {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "int4": 4}[self.value]

    @property
    def is_quantized(self) -> bool:
        """Whether weights are integers with scales."""
        return self in (Precision.INT8, Precision.INT4)


_FLOAT_DTYPES = {
    Precision.FP32: torch.float32,
    Precision.BF16: torch.bfloat16,
    Precision.FP16: torch.float16,
}


def sum_in_fp32() -> None:
    """From now on torch's matmuls on a GPU add up 16-bit products in fp32."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def compute_dtype(precision: Precision, device: torch.device, config: ModelConfig) -> torch.dtype:
    """The dtype activations have where weights have this precision.

    Quantised weights compute in fp32 on a CPU. On a GPU they compute in fp16, or in bf16 where the model was
    published in bf16 (its activations overflow fp16) and the card has it.
    """
    if not precision.is_quantized:
        return _FLOAT_DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    if config.stored_dtype == "bfloat16" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float16
