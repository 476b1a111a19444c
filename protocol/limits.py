"""Every size a peer may ask us to hold. Annotated types carry the bounds, so a field cannot be declared without one."""

from typing import Annotated

from msgspec import Meta

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

Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Bytes = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Total = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
PositiveCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Index = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e12)]
PositiveSeconds = Annotated[float, Meta(ge=1e-3, le=1e9)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
NO_CHANCE = -1e30
"""The log-probability, on the wire, of a token that the model gave no chance at all."""
Logprob = Annotated[float, Meta(ge=NO_CHANCE, le=1e-3)]
"""Natural. Rounding may lift a certain one above 0."""
Name = Annotated[str, Meta(max_length=MAX_NAME)]
PathText = Annotated[str, Meta(max_length=4096)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Prompt = Annotated[str, Meta(max_length=MAX_PROMPT)]
TokenIds = Annotated[tuple[Count, ...], Meta(max_length=MAX_TOKENS)]


def clip_text(text: str, limit: int = MAX_TEXT) -> str:
    """`text`, shortened to fit a field of so many characters; for errors, which may list more than fits."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")
    return encodable if len(encodable) <= limit else encodable[: limit - 4] + " ..."
