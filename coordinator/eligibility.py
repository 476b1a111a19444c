"""Why a worker that wants to join does not suit this launch, in words that name the remedy: pure."""

import ipaddress
from collections.abc import Callable, Collection

from coordinator.plan import parse_device
from protocol.control import HostModel, Join
from protocol.endpoints import checked_own_address, host_of, ipc_path, is_local
from protocol.errors import EndpointError, SecurityError
from protocol.security import checked_key
from protocol.version import VERSION


def version_fault(who: str, join: Join) -> str:
    """That its version of glmpipe does not suit (see `protocol.version.suits`)."""
    return f"{who} runs glmpipe {join.glmpipe_version}, the coordinator {VERSION}: install the same version on both"


def stranger_fault(key: str, token: str | None, used_by: Callable[[str], str | None]) -> tuple[str, str]:
    """Of a key that is not allowed: the code of the refusal, and what is wrong with the token, if it had one."""
    if not token:
        allow = f"glmpipe keys allow NAME_OF_ITS_HOST '{key}'"
        return "unknown_key", f"its host's key is not allowed; on the launching host: {allow}"
    thief = used_by(token)
    if thief is None:
        return "token", "its token is wrong or too old: take the one that launch gives out now"
    return "token", (
        f"its token was used before, by the key {thief}, not by this one, {key}. Unless that is another of your own "
        f"hosts, somebody has read the token: on the launching host, glmpipe keys revoke '{thief}'; then take the "
        "token that launch gives out next"
    )


def own_fault(join: Join) -> str | None:
    """What no worker of this host would say of itself; None if one could."""
    try:
        endpoint = checked_own_address(join.data_endpoint)
        if join.is_guarded:
            checked_key(join.public_key)
    except (EndpointError, SecurityError) as error:
        return str(error)
    if not is_local(endpoint) and not join.is_guarded:
        return f"{endpoint} demands no keys"
    return _device_fault(join)


def reach_fault(join: Join, addresses: Collection[str]) -> str | None:
    """Why neither this host nor a neighbouring stage could connect to that worker as it says; None if they could.

    `addresses` are those that are known to be its host's: nobody is sent to another's.
    """
    try:
        endpoint = checked_own_address(join.data_endpoint)
        checked_key(join.public_key)
    except (EndpointError, SecurityError) as error:
        return str(error)
    if ipc_path(endpoint) is not None or endpoint.endswith((":*", ":0")):
        return f"{join.data_endpoint:.80} is no address and port"
    address = (host_of(endpoint) or "").strip("[]")
    if ipaddress.ip_address(address) not in {ipaddress.ip_address(known) for known in addresses if known}:
        return (
            f"it says to be at {address}, and comes from {' or '.join(sorted(filter(None, addresses)))}; if both are "
            f"its, on the launching host: glmpipe keys allow {join.host} 'ITS KEY' --address {address}"
        )
    return _device_fault(join) if join.is_guarded else f"{endpoint} demands no keys"


def _device_fault(join: Join) -> str | None:
    is_known = parse_device(join.device) == join.device
    return None if is_known else f"{join.device!r:.40} is no device (cpu, cuda:0, cuda:1, ...)"


def model_fault(launched: HostModel, there: HostModel, host: str) -> str | None:
    """What is wrong with the model that a worker was told to load; None where it is the one launched."""
    if launched.fingerprint in ("", there.fingerprint):
        return None
    remedy = "put the same files in both places, or name another --model there"
    if there.num_layers != launched.num_layers:
        counts = f"has {there.num_layers} layers, the launched model {launched.name} {launched.num_layers}"
        return f"{there.name} of {host} {counts}: {remedy}"
    prints = f"(fingerprint {there.fingerprint}, wanted {launched.fingerprint})"
    return f"{there.name} of {host} is not the launched model {launched.name} {prints}: {remedy}"
