"""A running launch as its clients see it: several at once, cancels, mistakes, clients that vanish."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

import coordinator
from coordinator.chat_model import ChatModel
from coordinator.plan_request import PlanRequest
from coordinator.service import serve
from protocol import client
from protocol.messages import Message
from protocol.sockets import Socket, client_socket, connect
from protocol.wire import decode, encode
from tests.end_to_end.faults import until
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow

PROMPT = client.TokenPrompt((5, 9, 12, 7))


def sampling(num_new: int) -> client.SamplingParams:
    return client.SamplingParams(1.0, 0, 1.0, 0.0, 1.0, None, (), num_new, True, True)


class Peer:
    """One client program."""

    def __init__(self, context: "zmq.Context[Socket]", endpoint: str) -> None:
        self.dealer = client_socket(context, zmq.DEALER)
        connect(self.dealer, endpoint)

    def say(self, message: Message) -> None:
        self.dealer.send_multipart(encode(message))

    def hear(self) -> Message:
        assert self.dealer.poll(60_000), "no answer"
        return decode(self.dealer.recv_multipart())[0]

    def answer(self, request_id: int) -> tuple[client.Finished | client.Error, list[int]]:
        """The end of an answer, and the ids that were streamed before it."""
        ids: list[int] = []
        while True:
            message = self.hear()
            assert message.request_id == request_id
            if isinstance(message, client.Finished | client.Error):
                return message, ids
            ids += message.token_ids


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatModel]:
    model_dir = tmp_path_factory.mktemp("model")
    write_checkpoint(model_dir, {**CAUSAL, "seq_length": 4096})
    with coordinator.launch(model_dir, PlanRequest(num_stages=2, num_threads=1), on_log=print) as chat_model:
        yield chat_model


@pytest.fixture
def new_peer(chat_model: ChatModel, tmp_path: Path) -> Iterator[Callable[[], Peer]]:
    stop = threading.Event()
    endpoint = f"ipc://{tmp_path}/client"
    thread = threading.Thread(target=serve, args=(chat_model, endpoint, stop.is_set))
    thread.start()
    context: zmq.Context[Socket] = zmq.Context()
    peers: list[Peer] = []

    def make() -> Peer:
        peers.append(Peer(context, endpoint))
        return peers[-1]

    yield make
    for peer in peers:
        peer.dealer.close(linger=0)
    context.term()
    stop.set()
    thread.join(timeout=60)
    assert not thread.is_alive()


def stages_hold_nothing(chat_model: ChatModel) -> bool:
    """Whether there are no tokens in the KV caches of any stage beside what is kept for requests to come."""
    kept = chat_model.engine.load().kept_tokens
    return all(pong.kv_tokens == kept for pong in chat_model.cluster.health())


def test_clients_at_once_get_what_each_gets_alone(new_peer: Callable[[], Peer]) -> None:
    """Two clients, one with two requests under way: all three answers are the one a lone client gets."""
    alone = new_peer()
    alone.say(client.Generate(1, PROMPT, sampling(12)))
    finished, streamed = alone.answer(1)
    assert isinstance(finished, client.Finished)
    assert finished.finish_reason == "length"
    assert list(finished.token_ids) == streamed
    assert len(streamed) == 12
    assert [stage.layers for stage in finished.stats.stages] == ["1-2", "3-4"]
    one, other = new_peer(), new_peer()
    one.say(client.Generate(7, PROMPT, sampling(12)))
    other.say(client.Generate(7, PROMPT, sampling(12)))
    assert one.answer(7)[0].token_ids == finished.token_ids
    assert other.answer(7)[0].token_ids == finished.token_ids


def test_a_cancel_ends_the_answer_and_frees_the_stages(new_peer: Callable[[], Peer], chat_model: ChatModel) -> None:
    """Finished says `cancelled` with what was generated until then, and the stages hold nothing."""
    peer = new_peer()
    peer.say(client.Generate(3, PROMPT, sampling(100_000)))
    assert isinstance(peer.hear(), client.Delta)
    peer.say(client.Cancel(3))
    finished, _ = peer.answer(3)
    assert isinstance(finished, client.Finished)
    assert finished.finish_reason == "cancelled"
    until(lambda: stages_hold_nothing(chat_model))


def test_mistakes_fail_the_request_and_nothing_else(new_peer: Callable[[], Peer]) -> None:
    """An id outside the vocabulary, an empty prompt, text for a model without tokenizer, garbage: then a good one."""
    peer = new_peer()
    for request_id, prompt, said in (
        (1, client.TokenPrompt((10**6,)), "vocabulary"),
        (2, client.TokenPrompt(()), "no tokens"),
        (3, client.TextPrompt("hello"), "tokenizer"),
    ):
        peer.say(client.Generate(request_id, prompt, None))
        error, _ = peer.answer(request_id)
        assert isinstance(error, client.Error)
        assert said in error.text
    peer.dealer.send_multipart([b"\x81garbage", b""])
    peer.say(client.Cancel(99))
    peer.say(client.Generate(4, PROMPT, sampling(2)))
    assert isinstance(peer.answer(4)[0], client.Finished)


def test_describe_says_what_runs(new_peer: Callable[[], Peer]) -> None:
    """Model, family, context, every part's place."""
    peer = new_peer()
    peer.say(client.Describe(5))
    description = peer.hear()
    assert isinstance(description, client.Description)
    assert description.family == "chatglm2"
    assert "stage 2, layers 3-4 -> fp32 -> cpu" in description.plan_lines


def test_a_client_that_vanishes_is_not_served_on(new_peer: Callable[[], Peer], chat_model: ChatModel) -> None:
    """Its endless answer is dropped from all stages, and others are served."""
    gone, stays = new_peer(), new_peer()
    gone.say(client.Generate(1, PROMPT, sampling(100_000)))
    assert isinstance(gone.hear(), client.Delta)
    gone.dealer.close(linger=0)
    stays.say(client.Generate(1, PROMPT, sampling(3)))
    assert isinstance(stays.answer(1)[0], client.Finished)
    until(lambda: stages_hold_nothing(chat_model))
