"""Clients of a launch that still loads wait with it."""

import threading
from pathlib import Path

import pytest
import zmq

from coordinator.client import connect
from coordinator.reception import Reception
from protocol.client import NOT_SERVING, Cancel, Describe, Description, Error, Generate, SamplingParams, TokenPrompt
from protocol.sockets import Socket, client_socket
from protocol.sockets import connect as connect_socket
from protocol.wire import decode, encode

DEFAULTS = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), None, False, False)


def test_a_client_waits_for_a_launch_that_loads(tmp_path: Path) -> None:
    """It hears what the launch waits for, asks again, and is connected as soon as somebody serves there."""
    told: list[str] = []
    with Reception() as reception:
        endpoint = f"ipc://{tmp_path}/client"

        def serve() -> None:
            router = reception.hand_over()
            identity, *frames = router.recv_multipart()
            message, _ = decode(frames)
            assert isinstance(message, Describe)
            described = Description(message.request_id, "model", "chatglm2", 100, (), DEFAULTS, None)
            router.send_multipart([identity, *encode(described)])

        server = threading.Thread(target=serve)

        def hear(waits_for: str) -> None:
            if not told:
                server.start()
            told.append(waits_for)

        reception.open(endpoint, lambda: "stage 2 (cpu of lab3) to load")
        with connect(endpoint, on_waiting=hear) as backend:
            assert backend.describe().model_name == "model"
        server.join()
    for text in told:
        assert text.startswith("stage 2 (cpu of lab3) to load, for ") and text.endswith(" s already")
    assert told


@pytest.mark.parametrize("fault", [IndexError, ValueError])
def test_every_request_is_answered_and_nothing_else_is(tmp_path: Path, fault: type[Exception]) -> None:
    """Garbage and cancels are passed over; a launch whose stages are changing right now has an answer, too."""

    def waits_for() -> str:
        raise fault

    context: zmq.Context[Socket] = zmq.Context()
    with Reception() as reception:
        reception.open(f"ipc://{tmp_path}/client", waits_for)
        dealer = client_socket(context, zmq.DEALER)
        connect_socket(dealer, f"ipc://{tmp_path}/client")
        dealer.send_multipart([b"garbage"])
        for message in (Cancel(1), Generate(2, TokenPrompt((1,)), None), Describe(3)):
            dealer.send_multipart(encode(message))
        answers = []
        for _ in range(2):
            assert dealer.poll(60_000), "no answer"
            answers.append(decode(dealer.recv_multipart())[0])
        assert [(type(each), each.request_id, each.code) for each in answers if isinstance(each, Error)] == [
            (Error, 2, NOT_SERVING),
            (Error, 3, NOT_SERVING),
        ]
        dealer.close(linger=0)
    context.term()
