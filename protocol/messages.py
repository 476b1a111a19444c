"""The closed set of messages, by plane; each type belongs to exactly one."""

from enum import Enum
from typing import get_args

from protocol.client import ClientMessage
from protocol.control import ControlMessage
from protocol.data import DataMessage
from protocol.limits import MAX_CLIENT_HEADER_BYTES, MAX_CONTROL_HEADER_BYTES, MAX_DATA_HEADER_BYTES

Message = ControlMessage | DataMessage | ClientMessage


class Plane(Enum):
    """Who talks to whom. A socket belongs to one plane and refuses messages of the others."""

    CONTROL = "control", MAX_CONTROL_HEADER_BYTES
    DATA = "data", MAX_DATA_HEADER_BYTES
    CLIENT = "client", MAX_CLIENT_HEADER_BYTES

    max_header_bytes: int
    """The largest header frame of this plane."""

    def __new__(cls, word: str, max_header_bytes: int) -> "Plane":
        plane = object.__new__(cls)
        plane._value_ = word
        plane.max_header_bytes = max_header_bytes
        return plane


MESSAGE_PLANES: dict[type[Message], Plane] = {
    message_type: plane
    for plane, union in (
        (Plane.CONTROL, ControlMessage),
        (Plane.DATA, DataMessage),
        (Plane.CLIENT, ClientMessage),
    )
    for message_type in get_args(union)
}
