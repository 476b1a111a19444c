"""What a worker answered to a request, and whether that is what was due."""

from coordinator.errors import LaunchError
from protocol.control import Failed
from protocol.messages import Message
from protocol.tensors import RawTensor

Reply = tuple[Message, tuple[RawTensor, ...]]


def expect(reply: Reply, wanted: type[Message], who: str) -> Reply:
    """The reply if it is of the wanted type.

    Raises:
        LaunchError: the worker answered Failed, with its words, or something else.
    """
    message = reply[0]
    if isinstance(message, Failed):
        raise LaunchError(f"{who}: {message.text}")
    if not isinstance(message, wanted):
        raise LaunchError(f"{who} answered {type(message).__name__} where {wanted.__name__} was due")
    return reply
