"""Every size a peer may ask us to hold. Annotated types carry the bounds, so a field cannot be declared without one."""

from dataclasses import dataclass
from typing import Annotated

MAX_TENSORS = 4
MAX_TENSOR_RANK = 4
MAX_TENSOR_DIM = 2**31 - 1
MAX_STEP_BYTES = 2**26
"""Of a step's hidden states: 4096 tokens of 4096 fp32 values. A worker binds before it knows whose model it gets."""
MAX_INSPECTED_BYTES = 2**22
"""Of one answer to Inspect; what is longer is asked for in pieces."""
MAX_FRAMES = 1 + MAX_TENSORS

MAX_DATA_HEADER_BYTES = 2**20
MAX_CONTROL_HEADER_BYTES = 2**17
MAX_CLIENT_HEADER_BYTES = 6 * 2**20
SMALL_HEADER_BYTES = 2**16
MAX_CONTAINERS = 2**15
"""Maps and arrays in one header; counted above SMALL_HEADER_BYTES, where they could cost real memory."""
MAX_MAP_KEYS = 64
"""In one map: more than any record has fields, or a header of megabytes could become hundreds of them."""

MAX_SPANS = 1024
MAX_UPDATES = 4096
MAX_STAGES = 256
MAX_TOKENS = 2**20
MAX_TURNS = 4096
MAX_STOP_STRINGS = 64
MAX_TOP_LOGPROBS = 20
MAX_NOTES = 16
MAX_NAME = 256
MAX_TEXT = 16_384
MAX_PROMPT = 2**20


@dataclass(frozen=True, slots=True)
class IntRange:
    """Bounds of an int field, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class FloatRange:
    """Bounds of a float field, both included; NaN and infinities are never valid."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MaxLength:
    """The most characters of a string, or entries of a tuple."""

    high: int


Id = Annotated[int, IntRange(0, 2**63 - 1)]
Bytes = Annotated[int, IntRange(0, 2**63 - 1)]
Total = Annotated[int, IntRange(0, 2**63 - 1)]
Count = Annotated[int, IntRange(0, 2**31 - 1)]
PositiveCount = Annotated[int, IntRange(1, 2**31 - 1)]
Index = Annotated[int, IntRange(0, 2**31 - 1)]
Seconds = Annotated[float, FloatRange(0.0, 1e12)]
PositiveSeconds = Annotated[float, FloatRange(1e-3, 1e9)]
Probability = Annotated[float, FloatRange(0.0, 1.0)]
NO_CHANCE = -1e30
"""The log-probability, on the wire, of a token that the model gave no chance at all."""
Logprob = Annotated[float, FloatRange(NO_CHANCE, 1e-3)]
"""Natural. Rounding may lift a certain one above 0."""
Name = Annotated[str, MaxLength(MAX_NAME)]
PathText = Annotated[str, MaxLength(4096)]
Text = Annotated[str, MaxLength(MAX_TEXT)]
Prompt = Annotated[str, MaxLength(MAX_PROMPT)]
TokenIds = Annotated[tuple[Count, ...], MaxLength(MAX_TOKENS)]


def clip_text(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, shortened to fit a field of so many characters; for errors, which may list more than fits."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return encodable if len(encodable) <= limit else encodable[: limit - 4] + " ..."
