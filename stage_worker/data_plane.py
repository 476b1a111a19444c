"""This worker's two sockets on the chain, with keys where they are due: a PULL for those before it, a PUSH onwards."""

import os
import socket as sockets
from contextlib import suppress
from pathlib import Path

import zmq

from protocol.control import Assign
from protocol.endpoints import host_of, ipc_path
from protocol.errors import EndpointError
from protocol.flood_guard import Flood, Inflow
from protocol.security import Gatekeeper, be_client, new_key_pair
from protocol.sockets import Socket, bind, connect, data_inflow_bytes, data_socket, receive, receive_from
from stage_worker.log import logger

WAKE = b""
"""A message that is no step: the sender, of this process or not, has the worker look at its commands."""


class DataPlane:
    """A bound PULL, guarded or not, and the key pair of this process. `close` it before its context ends.

    A guarded PULL takes messages only of the sender whose key the assignment names: none before there is one.
    """

    def __init__(self, context: "zmq.Context[Socket]", endpoint: str, *, is_guarded: bool) -> None:
        """Bind. Raises EndpointError."""
        self.keys = new_key_pair()
        self.is_guarded = is_guarded
        self.admitted = ""
        self.wake_endpoint = "inproc://wake"
        self._context = context
        self._gatekeeper = Gatekeeper(context, _report) if is_guarded else None
        self._inflow = Inflow(data_inflow_bytes(num_stages=1))
        self._backflow: Inflow | None = None
        self.pull = data_socket(context, zmq.PULL)
        self.endpoint = ""
        try:
            if self._gatekeeper is not None:
                self._gatekeeper.guard(
                    self.pull,
                    self.keys,
                    "data",
                    lambda key: key == self.admitted,
                    may_retry=True,
                    inflow=self._inflow,
                )
            self.endpoint = bind(self.pull, endpoint)
            self._inflow.listens_at(self.endpoint)
            self.pull.bind(self.wake_endpoint)
        except BaseException:
            self.close()
            raise

    def open_next(self, assign: Assign) -> Socket:
        """Admit the assignment's previous hop; a PUSH to its next hop. Raises EndpointError or SecurityError."""
        if self.is_guarded:
            self.admitted = assign.previous_public_key or ""
            self._inflow.limit_bytes = data_inflow_bytes(assign.num_stages)
        push = data_socket(self._context, zmq.PUSH)
        try:
            if assign.next_public_key is not None:
                be_client(push, self.keys, assign.next_public_key)
                self._expect_nothing()
            if self._backflow is not None:
                self._backflow.leads_to(assign.next_endpoint)
            connect(push, assign.next_endpoint)
        except BaseException:
            push.close()
            raise
        return push

    def _expect_nothing(self) -> None:
        """The next stage is another host's, and has nothing to say on this way."""
        if self._gatekeeper is None:
            self._gatekeeper = Gatekeeper(self._context, _report)
        if self._backflow is None:
            self._backflow = self._gatekeeper.expect_nothing("next")

    def receive(self) -> list[memoryview] | None:
        """The next message; None for WAKE, and for one of somebody who is not, or no longer, the previous hop."""
        if self.is_guarded:
            sender, frames = receive_from(self.pull, self._inflow)
            if sender != self.admitted:
                return None
        else:
            frames = receive(self.pull)
        return frames if len(frames) > 1 or len(frames[0]) else None

    def close(self) -> None:
        """Close the PULL and forget its file. Safe to call twice."""
        if self.is_guarded:
            self.admitted = ""
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        self.pull.close()
        unlink_socket(self.endpoint)


def _report(flood: Flood) -> None:
    if flood.num_strangers:
        logger.warning("ended %d connections of %s that had not shaken hands", flood.num_strangers, flood.address)
        return
    whose = "previous" if flood.domain == "data" else "next"
    held_mb = flood.held_bytes / 1e6
    logger.warning(
        "ended a connection with the %s stage's host, %s: %.0f MB came that were no steps",
        whose,
        flood.address,
        held_mb,
    )


def listening_endpoint(join_endpoint: str) -> str:
    """Where to listen by default: beside the coordinator's socket, or on a free port of the address that leads there.

    Raises EndpointError when nothing leads there.
    """
    socket_path = ipc_path(join_endpoint)
    if socket_path is not None:
        return f"ipc://{socket_path.parent}/worker-{os.getpid()}"
    host, port = (host_of(join_endpoint) or "").strip("[]"), join_endpoint.rpartition(":")[2]
    try:
        family, kind, protocol, _, address = sockets.getaddrinfo(host, port, type=sockets.SOCK_DGRAM)[0]
        with sockets.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing; asks the system for its route
            own: str = probe.getsockname()[0]
    except OSError as error:
        raise EndpointError(
            f"{join_endpoint}: {error.strerror}; say with --listen where this worker is reached"
        ) from None
    return f"tcp://[{own}]:*" if ":" in own else f"tcp://{own}:*"


def unlink_socket(endpoint: str) -> None:
    """ZeroMQ leaves the file of an ipc socket behind."""
    socket_path = ipc_path(endpoint)
    if endpoint and socket_path is not None:
        with suppress(OSError):
            Path(socket_path).unlink()
