"""Which addresses glmpipe binds and connects: `ipc://` files and `tcp://`; which of them stay on this host."""

import ipaddress
import re
from pathlib import PurePosixPath

from protocol.errors import EndpointError

MAX_IPC_PATH_BYTES = 107
_TCP = re.compile(r"(\[[^\]]*\]|[^:\[\]]+):(\d{1,5}|\*)")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")


def checked_endpoint(endpoint: str) -> str:
    """`endpoint` as ZeroMQ should get it (`localhost` becomes 127.0.0.1). Raises EndpointError saying what to use."""
    transport, separator, address = endpoint.partition("://")
    if not separator or not endpoint.isprintable():
        raise EndpointError(f"{endpoint!r:.200} is no endpoint: use ipc:///path/to/socket or tcp://HOST:PORT")
    if transport == "ipc":
        return "ipc://" + _checked_path(address)
    if transport == "tcp":
        return "tcp://" + _checked_address(address)
    raise EndpointError(f"{endpoint}: transport {transport!r} is not supported, use ipc:// or tcp://")


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


def is_local(endpoint: str) -> bool:
    """Whether a checked endpoint is out of other hosts' reach: a file, or an address of the loopback interface."""
    host = host_of(endpoint)
    return host is None or _is_loopback(host)


def host_of(endpoint: str) -> str | None:
    """The host of a checked `tcp://` endpoint, an IPv6 address in brackets; None for a file."""
    return None if ipc_path(endpoint) is not None else endpoint.removeprefix("tcp://").rpartition(":")[0]


def checked_own_address(endpoint: str) -> str:
    """A checked endpoint to bind: an address of one interface, since others are told to come there.

    Raises EndpointError for a name, which may mean several addresses, and for all interfaces at once.
    """
    checked = checked_endpoint(endpoint)
    host = host_of(checked)
    if host is None:
        return checked
    try:
        is_all = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        raise EndpointError(f"{endpoint}: {host} is no IP address; give the one that other hosts reach") from None
    if is_all:
        raise EndpointError(f"{endpoint}: all interfaces at once are not bound; give the address other hosts reach")
    return checked


def _checked_address(address: str) -> str:
    match = _TCP.fullmatch(address)
    if match is None:
        raise EndpointError(f"tcp://{address} is no host and port: use tcp://HOST:PORT")
    host, port = match.groups()
    if port != "*" and not 0 <= int(port) <= 65535:
        raise EndpointError(f"tcp://{address}: port {port} is not in 0..65535")
    if host == "localhost":
        host = "127.0.0.1"
    if host.startswith("["):
        _check_ipv6(host)
    elif not _HOST_NAME.fullmatch(host):
        raise EndpointError(f"tcp://{address}: {host!r} is neither a host's name nor an IP address")
    return f"{host}:{port}"


def _check_ipv6(host: str) -> None:
    try:
        ipaddress.IPv6Address(host.strip("[]"))
    except ValueError:
        raise EndpointError(f"tcp://{host}: that is no IPv6 address") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
