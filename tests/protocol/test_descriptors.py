"""Descriptors: as many as the system grants, and a typed error where there are none."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq

from protocol.descriptors import descriptor_limit, raise_descriptor_limit
from protocol.errors import DescriptorError
from protocol.sockets import Socket, data_socket


@contextmanager
def soft_limit(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_program_takes_what_it_is_granted() -> None:
    """The soft limit becomes the hard one."""
    with soft_limit(200):
        assert descriptor_limit() == 200
        assert raise_descriptor_limit() > 200


def test_without_a_descriptor_a_socket_is_a_typed_error(context: "zmq.Context[Socket]") -> None:
    """It names the limit and the remedy; with one it can be made again."""
    data_socket(context, zmq.PUSH).close()  # so that the context has its own descriptors
    with soft_limit(1), pytest.raises(DescriptorError, match=r"1 descriptors are allowed: `ulimit -n`"):
        data_socket(context, zmq.PUSH)
    data_socket(context, zmq.PUSH).close()
