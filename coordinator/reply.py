"""What a worker answered to a request, and whether that is what was due."""

from collections.abc import Callable

import torch

from coordinator.errors import LaunchError, StageLost
from protocol.control import Failed, Inspected
from protocol.messages import Message
from protocol.tensors import RawTensor
from protocol.torch_bridge import from_raw

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


def inspected_whole(ask: Callable[[int], Reply], who: str) -> torch.Tensor:
    """All pieces of something that is inspected, one behind the other; `ask` has them sent from a position on.

    Raises:
        LaunchError: the worker has no such thing. StageLost: it does not send all of it, or something else.
    """
    pieces: list[torch.Tensor] = []
    num_tokens = num_there = 0
    while not pieces or num_there < num_tokens:
        inspected, tensors = expect(ask(num_there), Inspected, who)
        assert isinstance(inspected, Inspected)
        piece = from_raw(tensors[0])
        if pieces and (inspected.num_tokens, piece.shape[1:]) != (num_tokens, pieces[0].shape[1:]):
            raise StageLost(f"{who} says something else of what it has with each piece of it")
        num_rows = len(piece) if piece.dim() else 0
        num_tokens, num_there = inspected.num_tokens, num_there + num_rows
        if num_there > num_tokens or (num_there < num_tokens and not num_rows):
            raise StageLost(f"{who} has {num_tokens} tokens of it and sent {num_there}")
        pieces.append(piece)
    return torch.cat(pieces)
