"""Which addresses are bound or connected: this host's freely, any other only with keys."""

from pathlib import Path

import pytest
import zmq

from protocol.control import Ping
from protocol.endpoints import checked_endpoint, host_of, ipc_path, is_local
from protocol.errors import EndpointError
from protocol.messages import Plane
from protocol.sockets import bind, connect, data_socket, receive, send
from protocol.wire import decode


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("ipc:///run/user/1/glmpipe-7-abcd/control", "ipc:///run/user/1/glmpipe-7-abcd/control"),
        ("tcp://127.0.0.1:5555", "tcp://127.0.0.1:5555"),
        ("tcp://127.8.9.10:*", "tcp://127.8.9.10:*"),
        ("tcp://localhost:0", "tcp://127.0.0.1:0"),
        ("tcp://[::1]:5555", "tcp://[::1]:5555"),
    ],
)
def test_this_host_is_allowed(endpoint: str, expected: str) -> None:
    """ipc files and the loopback interface, in one canonical spelling."""
    assert checked_endpoint(endpoint) == expected


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://192.168.1.2:1", "tcp://example.org:1", "tcp://lab-2:1", "tcp://[fd00::1]:1", "tcp://128.0.0.1:1"],
)
def test_other_hosts_are_told_from_this_one(endpoint: str) -> None:
    """A name counts as another host, wherever it leads; only files and loopback addresses are local."""
    assert checked_endpoint(endpoint) == endpoint
    assert not is_local(endpoint)
    assert is_local("tcp://127.0.0.9:1") and is_local("tcp://[::1]:1") and is_local("ipc:///tmp/x")
    assert host_of("tcp://[::1]:7") == "[::1]" and host_of("tcp://lab-2:7") == "lab-2" and host_of("ipc:///x") is None


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("", "no endpoint"),
        ("127.0.0.1:5555", "no endpoint"),
        ("ipc://\n/tmp/x", "no endpoint"),
        ("inproc://x", "'inproc' is not supported"),
        ("udp://127.0.0.1:1", "'udp' is not supported"),
        ("ipc://relative", "absolute path"),
        ("ipc://@abstract", "absolute path"),
        ("ipc://*", "absolute path"),
        ("ipc:///tmp/", "absolute path"),
        ("ipc:///" + "x" * 107, "108 bytes, a socket file at most 107"),
        ("tcp://127.0.0.1", "no host and port"),
        ("tcp://127.0.0.1:99999", "port 99999"),
        ("tcp://127.0.0.1:http", "no host and port"),
        ("tcp://127.0.0.2:1;127.0.0.1:2", "no host and port"),
        ("tcp://::1:5", "no host and port"),
        ("tcp://*:5", "neither a host's name nor an IP address"),
        ("tcp://[::zz]:5", "no IPv6 address"),
    ],
)
def test_malformed_endpoints(endpoint: str, words: str) -> None:
    """Each malformed address says what is wrong with it."""
    with pytest.raises(EndpointError, match=words):
        checked_endpoint(endpoint)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:*", "tcp://localhost:*", "ipc"])
def test_sockets_talk(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, address: str) -> None:
    """What bind returns can be connected to, on every allowed transport."""
    with data_socket(context, zmq.PULL) as pull, data_socket(context, zmq.PUSH) as push:
        connect(push, bind(pull, f"ipc://{tmp_path}/s" if address == "ipc" else address))
        assert push.poll(60_000, zmq.POLLOUT)
        send(push, Ping(5))
        assert pull.poll(60_000)
        assert decode(receive(pull), Plane.CONTROL) == (Ping(5), ())


def test_a_data_socket_queues_only_for_a_peer_that_is_there(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    """A step for a next hop that does not listen is not accepted, instead of waiting for somebody else."""
    with data_socket(context, zmq.PUSH) as push:
        connect(push, f"ipc://{tmp_path}/nobody")
        with pytest.raises(zmq.Again):
            send(push, Ping(5), flags=zmq.NOBLOCK)


def test_without_keys_nothing_reaches_other_hosts(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    """No socket gets past the rule, the refusal says what to do, and a bind that the system refuses is told too."""
    with data_socket(context, zmq.PULL) as socket:
        with pytest.raises(EndpointError, match=r"192\.0\.2\.1.*bound.*without keys.*glmpipe keys new.*ipc:///"):
            bind(socket, "tcp://192.0.2.1:*")
        with pytest.raises(EndpointError, match=r"10\.0\.0\.1:5.*connected.*without keys"):
            connect(socket, "tcp://10.0.0.1:5")
        with pytest.raises(EndpointError, match=r"cannot bind ipc://.*absent"):
            bind(socket, f"ipc://{tmp_path}/absent/s")


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://lab2:1"])
def test_one_address_is_bound(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
    """All interfaces at once, or a name that may be several, is refused with what to give instead, keys or not."""
    with data_socket(context, zmq.PULL) as socket, pytest.raises(EndpointError, match="other hosts reach"):
        bind(socket, endpoint)


def test_ipc_path() -> None:
    """The file behind an ipc endpoint; other transports have none."""
    assert str(ipc_path("ipc:///tmp/a/b")) == "/tmp/a/b"
    assert ipc_path("tcp://127.0.0.1:1") is None
