"""Every message comes out of the wire as it went in."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.control import Inspected
from protocol.data import DropSequence, Span, StageTiming, Step
from protocol.errors import MessageError
from protocol.messages import MESSAGE_PLANES
from protocol.records import Record
from protocol.tensors import FLOAT_DTYPES, ITEM_SIZES, RawTensor
from protocol.wire import decode, encode, encode_valid

TEXT = st.characters(exclude_categories=("Cs",))


def strategy_for(annotation: Any, bound: Any = None) -> st.SearchStrategy[Any]:
    """Values of a field, from its annotation alone, so that a new message is tested without a new line here."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return strategy_for(*get_args(annotation))
    if origin in (Union, UnionType):
        return st.one_of([st.none() if a is NoneType else strategy_for(a) for a in get_args(annotation)])
    if origin is Literal:
        return st.sampled_from(get_args(annotation))
    if origin is tuple:
        return st.lists(strategy_for(get_args(annotation)[0]), max_size=3).map(tuple)
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return messages_of(annotation)
    if annotation is int:
        return st.integers(bound.ge, bound.le)
    if annotation is float:
        return st.floats(bound.ge, bound.le)
    return {bool: st.booleans(), str: st.text(TEXT, max_size=min(40, getattr(bound, "max_length", 0)))}[annotation]


def messages_of(cls: Any) -> st.SearchStrategy[Any]:
    """Valid instances of a message or record class."""
    hints = get_type_hints(cls, include_extras=True)
    fields = st.fixed_dictionaries({f.name: strategy_for(hints[f.name]) for f in msgspec.structs.fields(cls)})
    return fields.map(lambda values: _construct(cls, values)).filter(lambda message: message is not None)


def _construct(cls: Any, values: dict[str, Any]) -> Any:
    try:
        return cls(**values)
    except MessageError:
        return None


def tensors_for(message: Any) -> tuple[RawTensor, ...]:
    """The tensors a message must carry, filled with a pattern."""
    if isinstance(message, Step):
        shape = (message.num_tokens, 3)
        return (RawTensor("float16", shape, bytes(range(6)) * shape[0]),)
    if isinstance(message, Inspected):
        return (RawTensor("float32", (2, 1, 3), bytes(range(24))),)
    return ()


def small(message: Any) -> bool:
    """Whether a drawn step's tensor fits a test."""
    return not isinstance(message, Step) or message.num_tokens < 10_000


@pytest.mark.parametrize("cls", MESSAGE_PLANES, ids=lambda cls: cls.__name__)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_message_round_trips(cls: Any, data: st.DataObject) -> None:
    """decode(encode(m)) == m for every message type, tensors included."""
    message = data.draw(messages_of(cls).filter(small))
    tensors = tensors_for(message)
    frames = encode(message, tensors)
    assert decode(frames, MESSAGE_PLANES[cls]) == (message, tensors)
    assert encode_valid(decode(frames)[0], tensors) == frames


@settings(max_examples=60, deadline=None)
@given(dtype=st.sampled_from(sorted(FLOAT_DTYPES)), rows=st.integers(0, 5), columns=st.integers(0, 7))
def test_tensors_round_trip_uncopied(dtype: str, rows: int, columns: int) -> None:
    """A tensor's buffer is handed on in both directions without a copy, whatever its dtype; empty ones too."""
    buffer = memoryview(bytearray(rows * columns * ITEM_SIZES[dtype]))
    spans = (Span(1, 0, rows, None, None),) if rows else ()
    step = Step(1, 2, (), spans, ())
    frames = encode(step, (RawTensor(dtype, (rows, columns), buffer),))
    assert frames[1] is buffer
    _, (tensor,) = decode(frames)
    assert (tensor.dtype, tensor.shape) == (dtype, (rows, columns))
    assert tensor.data is buffer


def test_a_long_step_fits_the_limits() -> None:
    """A step at the limit of spans, updates and stages still is a valid message."""
    spans = tuple(Span(2**62 + i, 2**30, 1, 2**30, 5) for i in range(1024))
    updates = tuple(DropSequence(2**62 + i) for i in range(4096))
    timings = tuple(StageTiming(i, 1e9, 1.0, 1e9, 2**40) for i in range(256))
    step = Step(1, 2, updates, spans, timings)
    tensor = RawTensor("float16", (1024, 1), bytes(2048))
    assert decode(encode(step, (tensor,))) == (step, (tensor,))


def test_whole_numbers_are_welcome_in_float_fields() -> None:
    """An int given for seconds, as a caller may, travels as the float it means."""
    frames = encode(Step(1, 2, (), (), (StageTiming(0, 1, 2, 3, 4),)), (RawTensor("float32", (0, 4), b""),))
    message, _ = decode(frames)
    assert isinstance(message, Step)
    assert type(message.timings[0].compute_s) is float
