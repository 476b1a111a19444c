"""Which addresses glmpipe binds and connects: `ipc://` files and `tcp://` on the loopback interface, nothing else."""

import ipaddress
import re
from pathlib import PurePosixPath

from protocol.errors import EndpointError

MAX_IPC_PATH_BYTES = 107
_TCP = re.compile(r"(\[[^\]]*\]|[^:\[\]]+):(\d{1,5}|\*)")


def checked_endpoint(endpoint: str) -> str:
    """`endpoint` as ZeroMQ should get it (`localhost` becomes 127.0.0.1). Raises EndpointError saying what to use."""
    transport, separator, address = endpoint.partition("://")
    if not separator or not endpoint.isprintable():
        raise EndpointError(f"{endpoint!r:.200} is no endpoint: use ipc:///path/to/socket or tcp://127.0.0.1:PORT")
    if transport == "ipc":
        return "ipc://" + _checked_path(address)
    if transport == "tcp":
        return "tcp://" + _checked_address(address)
    raise EndpointError(f"{endpoint}: transport {transport!r} is not supported, use ipc:// or tcp:// on loopback")


def ipc_path(endpoint: str) -> PurePosixPath | None:
    """The socket file of an `ipc://` endpoint, None for other transports."""
    return PurePosixPath(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None


def needs_ipv6(endpoint: str) -> bool:
    """Whether the socket must have IPv6 switched on."""
    return endpoint.startswith("tcp://[")


def _checked_path(path: str) -> str:
    if not path.startswith("/") or path.endswith("/"):
        raise EndpointError(f"ipc://{path}: use the absolute path of a socket file, ipc:///path/to/socket")
    num_bytes = len(path.encode("utf-8", "surrogateescape"))
    if num_bytes > MAX_IPC_PATH_BYTES:
        raise EndpointError(
            f"ipc://{path}: the path has {num_bytes} bytes, a socket file at most {MAX_IPC_PATH_BYTES}: "
            "use a shorter directory (XDG_RUNTIME_DIR or TMPDIR)"
        )
    return path


def _checked_address(address: str) -> str:
    match = _TCP.fullmatch(address)
    if match is None:
        raise EndpointError(f"tcp://{address} is no host and port: use tcp://127.0.0.1:PORT")
    host, port = match.groups()
    if port != "*" and not 0 <= int(port) <= 65535:
        raise EndpointError(f"tcp://{address}: port {port} is not in 0..65535")
    if host == "localhost":
        host = "127.0.0.1"
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise EndpointError(
            f"tcp://{address}: {host} is not this host's loopback interface. Other hosts, and the keys they need, are "
            "not supported yet: use tcp://127.0.0.1:PORT (also 127.x.y.z, localhost, [::1]) or ipc:///path/to/socket"
        )
    return f"{host}:{port}"
