"""The backend behind `--connect`, against a scripted launch: streaming, cancelling, failing, and a launch that dies."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from coordinator import client as client_module
from coordinator import which_launch
from coordinator.batch import Request
from coordinator.client import RemoteBackend, connect
from coordinator.errors import ConnectError, GenerationError, StageLost, UsageError
from coordinator.runtime_dir import CLIENT_SOCKET, RuntimeDir
from protocol import sockets
from protocol.client import (
    Cancel,
    ChatPrompt,
    ChatTurn,
    ClientMessage,
    Delta,
    Describe,
    Description,
    Error,
    Finished,
    Generate,
    TextPrompt,
)
from protocol.limits import MAX_PROMPT
from protocol.messages import Plane
from protocol.records import with_changes
from protocol.wire import decode, encode
from tests.coordinator.fake_backend import DEFAULTS, STATS

PROMPT = ChatPrompt((ChatTurn("user", "", "你好"),))
Script = Callable[[ClientMessage], list[ClientMessage] | None]


class FakeLaunch:
    """A ROUTER that answers Describe, and everything else by a script; a script's None makes it die."""

    def __init__(self, endpoint: str, script: Script) -> None:
        self.received: list[ClientMessage] = []
        self._script = script
        self._context: zmq.Context[sockets.Socket] = zmq.Context()
        self._socket = sockets.client_socket(self._context, zmq.ROUTER)
        self.endpoint = sockets.bind(self._socket, endpoint)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.term()

    def _run(self) -> None:
        while not self._closing.is_set():
            if not self._socket.poll(20):
                continue
            identity, *frames = self._socket.recv_multipart()
            message, _ = decode(frames, Plane.CLIENT)
            self.received.append(message)
            if isinstance(message, Describe):
                described = Description(message.request_id, "model", "chatglm2", 100, ("plan",), DEFAULTS, None)
                replies: list[ClientMessage] | None = [described]
            else:
                replies = self._script(message)
            if replies is None:
                break
            for reply in replies:
                self._socket.send_multipart([identity, *encode(reply)])
        self._socket.close(linger=0)


LaunchMaker = Callable[[Script], FakeLaunch]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[LaunchMaker]:
    """Makes scripted launches that are closed when the test ends."""
    made = []

    def make(script: Script) -> FakeLaunch:
        made.append(FakeLaunch(f"ipc://{tmp_path}/{len(made)}", script))
        return made[-1]

    yield make
    for one in made:
        one.close()


def finished(request_id: int, reason: str = "stop") -> Finished:
    return Finished(request_id, reason, "你好", (1, 2), STATS)


def answering(message: ClientMessage) -> list[ClientMessage]:
    if not isinstance(message, Generate):
        return []
    request_id = message.request_id
    stale = Delta(request_id + 100, "somebody else's", (9,))
    return [Delta(request_id, "你", (1,)), stale, Delta(request_id, "好", (2,)), finished(request_id)]


def test_an_answer_is_streamed(launch: LaunchMaker) -> None:
    """Description, prompt and params arrive; the parts of this request come back, and nothing of another."""
    running = launch(answering)
    with connect(running.endpoint) as backend:
        assert backend.describe().model_name == "model"
        events = list(backend.stream(PROMPT, DEFAULTS))
        again = list(backend.stream(TextPrompt("x")))
    assert [event.text for event in events] == ["你", "好", "你好"]
    assert isinstance(events[-1], Finished) and isinstance(again[-1], Finished)
    assert running.received[1:] == [Generate(2, PROMPT, DEFAULTS), Generate(3, TextPrompt("x"), None)]


def test_a_cancel_is_passed_on_once(launch: LaunchMaker) -> None:
    """Asked for from another place, as a signal handler does; the answer ends as cancelled."""

    def script(message: ClientMessage) -> list[ClientMessage]:
        if isinstance(message, Generate):
            return [Delta(message.request_id, "a", (1,))]
        return [Delta(message.request_id, "b", (1,)), finished(message.request_id, "cancelled")]

    running = launch(script)
    with connect(running.endpoint) as backend:
        reasons = []
        for event in backend.stream(PROMPT):
            backend.cancel()
            reasons.append(getattr(event, "finish_reason", None))
        assert reasons == [None, None, "cancelled"]
    assert running.received[2:] == [Cancel(2)]


def test_leaving_a_stream_cancels_it(launch: LaunchMaker) -> None:
    """Whoever stops listening does not leave the launch computing."""
    cancelled = threading.Event()

    def script(message: ClientMessage) -> list[ClientMessage]:
        if isinstance(message, Cancel):
            cancelled.set()
            return []
        return [Delta(message.request_id, "a", (1,))]

    with connect(launch(script).endpoint) as backend:
        stream = backend.stream(PROMPT)
        next(stream)
        stream.close()
        assert cancelled.wait(60)


def test_failures_are_told_apart(launch: LaunchMaker) -> None:
    """A failed request leaves the next one untouched; a lost stage means the end."""

    def script(message: ClientMessage) -> list[ClientMessage]:
        assert isinstance(message, Generate)
        codes = {2: "GenerationError", 3: "TokenizerError", 4: "StageLost"}
        return [Error(message.request_id, codes[message.request_id], f"fault {message.request_id}")]

    with connect(launch(script).endpoint) as backend:
        for number, kind in ((2, GenerationError), (3, GenerationError), (4, StageLost)):
            with pytest.raises(kind, match=f"fault {number}"):
                list(backend.stream(PROMPT))


def test_a_launch_that_dies_is_noticed_at_once(launch: LaunchMaker) -> None:
    """No deadline has to pass: the broken connection says it."""

    def die(message: ClientMessage) -> None:
        del message

    with connect(launch(die).endpoint) as backend, pytest.raises(ConnectError, match="is gone"):
        list(backend.stream(PROMPT))


def test_what_the_launch_said_before_it_died_is_not_lost(launch: LaunchMaker) -> None:
    """A launch that loses a stage says so and ends; its last words come first."""

    class Dying:
        told = False

        def __call__(self, message: ClientMessage) -> list[ClientMessage] | None:
            if self.told:
                return None
            self.told = True
            return [Error(message.request_id, "StageLost", "stage 2 died")]

    with connect(launch(Dying()).endpoint) as backend:
        with pytest.raises(StageLost, match="stage 2 died"):
            list(backend.stream(PROMPT))
        with pytest.raises(ConnectError, match="is gone"):
            list(backend.stream(PROMPT))


def test_deadlines(launch: LaunchMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that never stops, and one that never says a word, are given up."""
    cancels = threading.Event()

    def script(message: ClientMessage) -> list[ClientMessage]:
        if isinstance(message, Generate) and cancels.is_set():
            backend.cancel()
        return []

    with connect(launch(script).endpoint) as backend:
        monkeypatch.setattr(client_module, "SILENCE_DEADLINE_S", 0.2)
        with pytest.raises(ConnectError, match=r"said nothing for 0\.2 s"):
            list(backend.stream(PROMPT))
        monkeypatch.setattr(client_module, "SILENCE_DEADLINE_S", 60.0)
        monkeypatch.setattr(client_module, "CANCEL_DEADLINE_S", 0.2)
        cancels.set()
        with pytest.raises(GenerationError, match=r"did not stop within 0\.2 s"):
            list(backend.stream(PROMPT))


def test_a_request_too_large_fails_alone(launch: LaunchMaker) -> None:
    """What the protocol does not carry is refused here, and the connection goes on."""
    with connect(launch(answering).endpoint) as backend:
        with pytest.raises(GenerationError, match="could not take this request"):
            list(backend.stream(TextPrompt("x" * (MAX_PROMPT + 1))))
        assert len(list(backend.stream(PROMPT))) == 3


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No launch, a socket file that is gone, one that nobody serves, and an endpoint that cannot be."""
    monkeypatch.setattr(which_launch, "find_running", lambda **_: ())
    with pytest.raises(ConnectError, match="no running `glmpipe launch`"):
        connect()
    with pytest.raises(ConnectError, match="does not exist"):
        connect(f"{tmp_path}/nothing")
    (tmp_path / "stale").touch()
    with pytest.raises(ConnectError, match=r"nobody answered at .*stale within 0\.2 s"):
        connect(f"ipc://{tmp_path}/stale", deadline_s=0.2)
    with pytest.raises(UsageError):
        connect("tcp://example.org:1")


def test_the_only_launch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an endpoint the runtime directories are looked through."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with RuntimeDir() as runtime_dir:
        running = FakeLaunch(runtime_dir.endpoint(CLIENT_SOCKET), answering)
        try:
            with connect() as backend:
                assert isinstance(backend, RemoteBackend)
                assert backend.endpoint == running.endpoint
        finally:
            running.close()


def request(num_answers: int = 1, seed: int | None = None) -> Request:
    return Request(PROMPT, with_changes(DEFAULTS, seed=seed), num_answers)


def test_many_answers_at_once_on_one_connection(launch: LaunchMaker) -> None:
    """Each is found by its ticket, whatever the order; one that fails does so alone; streaming goes on as before."""
    asked: list[int] = []

    def script(message: ClientMessage) -> list[ClientMessage]:
        assert isinstance(message, Generate)
        asked.append(message.request_id)
        if len(asked) < 3:
            return [Delta(message.request_id, "a", (1, 2))]
        if len(asked) > 3:
            return answering(message)
        return [Error(asked[1], "GenerationError", "it failed"), finished(asked[2]), finished(asked[0])]

    running = launch(script)
    with connect(running.endpoint) as backend:
        tickets = [*backend.submit(request(2, seed=7)), *backend.submit(request())]
        ended, num_tokens = [], 0
        while len(ended) < 3:
            progress = backend.poll()
            ended += progress.ended
            num_tokens += progress.num_new_tokens
        assert len(list(backend.stream(PROMPT))) == 3
    assert tickets == asked[:3]
    assert num_tokens == 4
    assert {each.ticket: (each.error, each.finished is not None) for each in ended} == {
        tickets[0]: (None, True),
        tickets[1]: ("it failed", False),
        tickets[2]: (None, True),
    }
    assert [message.sampling.seed for message in running.received[1:4]] == [7, 8, None]  # type: ignore[union-attr]


def test_dropping_cancels_all_that_is_open(launch: LaunchMaker) -> None:
    """And what still comes of it is not mistaken for anything else."""
    cancelled = threading.Event()

    def script(message: ClientMessage) -> list[ClientMessage]:
        if isinstance(message, Cancel):
            if message.request_id == 3:
                cancelled.set()
            return [finished(message.request_id, "cancelled")]
        return []

    running = launch(script)
    with connect(running.endpoint) as backend:
        backend.submit(request(2))
        backend.drop()
        assert cancelled.wait(60)
        assert backend.poll().ended == ()
    assert running.received[3:] == [Cancel(2), Cancel(3)]


def test_a_lost_launch_ends_all_answers(launch: LaunchMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is gone, a launch that is gone, one that is silent, and a request that it could not take."""

    def lost(message: ClientMessage) -> list[ClientMessage]:
        return [Error(message.request_id, "StageLost", "stage 2 died")]

    def poll_to_the_end(backend: RemoteBackend) -> None:
        backend.submit(request())
        while True:
            backend.poll()

    with connect(launch(lost).endpoint) as backend, pytest.raises(StageLost, match="stage 2 died"):
        poll_to_the_end(backend)
    with connect(launch(lambda _: None).endpoint) as backend, pytest.raises(ConnectError, match="is gone"):
        poll_to_the_end(backend)
    with connect(launch(lambda _: []).endpoint) as backend:
        with pytest.raises(GenerationError, match="could not take this request"):
            backend.submit(replace(request(), prompt=TextPrompt("x" * (MAX_PROMPT + 1))))
        monkeypatch.setattr(client_module, "SILENCE_DEADLINE_S", 0.2)
        with pytest.raises(ConnectError, match=r"said nothing for 0\.2 s"):
            poll_to_the_end(backend)
