"""Which running launch `--connect` means: the one that is named, the only one there is, or the only one that serves."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime
from pathlib import Path

import zmq

from coordinator.errors import ConnectError, UsageError
from coordinator.legible import legible
from coordinator.runtime_dir import RunningLaunch, find_running
from protocol.client import Describe, Description, Error
from protocol.endpoints import checked_endpoint, ipc_path
from protocol.errors import EndpointError, ProtocolError
from protocol.messages import Plane
from protocol.sockets import Socket, client_socket, connect, send
from protocol.wire import decode

FIND_S = 5.0
"""How long a launch is looked for that was started a moment ago."""
_LOOK_AGAIN_S = 0.1
ASK_S = 2.0
"""How long several launches have to say what they are; one that computes a long prompt says nothing meanwhile."""


@contextmanager
def endpoint_faults_as_usage() -> Iterator[None]:
    """An endpoint that cannot be used is a mistake of whoever named it: UsageError."""
    try:
        yield
    except EndpointError as error:
        raise UsageError(str(error)) from None


def endpoint_of(
    name: str | None,
    ask_s: float = ASK_S,
    *,
    find_s: float = 0.0,
    on_looking: Callable[[float], None] = lambda _: None,
) -> str:
    """The endpoint of the launch that `name` means: its endpoint, its socket's path, its pid; None: the one there is.

    One that was started a moment ago is looked for for `find_s`; `on_looking` hears of that.

    Raises:
        ConnectError: there is no such launch. UsageError: there are several, or that is no endpoint.
    """
    if name is None:
        _wait_for(find_running, find_s, on_looking)
        return _only_one(ask_s).endpoint
    if not isinstance(name, str):
        raise UsageError(f"the launch is {name!r}; it must be a text: an endpoint, a socket's path or a pid")
    if name.isdecimal():
        pid = int(name)
        _wait_for(lambda: [each for each in find_running(everywhere=True) if each.pid == pid], find_s, on_looking)
        return _of_pid(pid).endpoint
    with endpoint_faults_as_usage():
        endpoint = checked_endpoint(f"ipc://{name}" if name.startswith("/") else name)
    path = ipc_path(endpoint)
    if path is not None and not Path(path).exists():
        raise ConnectError(f"{path} does not exist: the launch has ended, or its endpoint is another one")
    return endpoint


def _wait_for(find: Callable[[], Sequence[RunningLaunch]], find_s: float, on_looking: Callable[[float], None]) -> None:
    """Until a launch is found, for as long as `find_s`."""
    until_s, has_told = time.monotonic() + find_s, False
    while not find() and time.monotonic() < until_s:
        if not has_told:
            has_told = True
            on_looking(find_s)
        time.sleep(_LOOK_AGAIN_S)


def _only_one(ask_s: float) -> RunningLaunch:
    running = find_running()
    if not running:
        raise ConnectError(
            "no running `glmpipe launch` of this user was found: start one in another terminal (it is found as soon as "
            "it starts its workers), or leave out --connect to run the model here"
        )
    if len(running) == 1:
        return running[0]
    said = _ask(running, ask_s)
    serving = [launch for launch in running if isinstance(said.get(launch.endpoint), Description)]
    if len(serving) == 1 and all(launch.endpoint in said for launch in running):
        return serving[0]
    lines = "".join(f"\n  --connect {launch.pid}  {_told(launch, said.get(launch.endpoint))}" for launch in running)
    raise UsageError(f"{len(running)} launches are running; say which one is meant:{lines}")


def _of_pid(pid: int) -> RunningLaunch:
    running = find_running(everywhere=True)
    for launch in running:
        if launch.pid == pid:
            return launch
    others = ", ".join(str(launch.pid) for launch in running) or "none"
    raise ConnectError(f"no `glmpipe launch` of this user has the pid {pid}; those that run: {others}")


def _told(launch: RunningLaunch, said: Description | Error | None) -> str:
    since = datetime.fromtimestamp(launch.since_s)
    text = f"since {since:%H:%M}" if since.date() == datetime.now().date() else f"since {since:%Y-%m-%d %H:%M}"
    match said:
        case Description():
            return f"{said.model_name} ({said.family}), {text}"
        case Error():
            return f"still loading, {text}: it waits for {said.text}"
    return f"{text}; it does not say what it is, so it may be busy with a long prompt"


def _ask(running: Sequence[RunningLaunch], ask_s: float) -> dict[str, Description | Error]:
    """What each launch says of itself, by endpoint, as far as they answer in time; an Error of one that still loads."""
    said: dict[str, Description | Error] = {}
    with ExitStack() as stack:
        context: zmq.Context[Socket] = stack.enter_context(zmq.Context())
        asked: dict[Socket, str] = {}
        poller = zmq.Poller()
        for launch in running:
            socket = stack.enter_context(closing(client_socket(context, zmq.DEALER)))
            socket.setsockopt(zmq.LINGER, 0)
            connect(socket, launch.endpoint)
            send(socket, Describe(1))
            asked[socket] = launch.endpoint
            poller.register(socket, zmq.POLLIN)
        until_s = time.monotonic() + ask_s
        while len(said) < len(running) and (left_s := until_s - time.monotonic()) > 0:
            for socket, _ in poller.poll(int(left_s * 1000) + 1):
                answer = _answer(socket)
                if answer is not None:
                    said[asked[socket]] = answer
    return said


def _answer(socket: Socket) -> Description | Error | None:
    try:
        message, _ = decode(socket.recv_multipart(), Plane.CLIENT)
    except ProtocolError:
        return None  # of another release
    return legible(message) if isinstance(message, Description | Error) else None
