"""Sockets with keys: who gets in, who does not, and that nobody does by accident."""

from collections.abc import Iterator

import pytest
import zmq

from protocol.control import Ping
from protocol.errors import SecurityError
from protocol.messages import Plane
from protocol.security import Gatekeeper, KeyPair, be_client, checked_key, new_key_pair, sender_key
from protocol.sockets import Socket, bind, connect, control_socket, data_socket, send
from protocol.wire import decode

SERVER, FRIEND, STRANGER = new_key_pair(), new_key_pair(), new_key_pair()
SILENCE_MS = 400


@pytest.fixture
def gatekeeper(context: "zmq.Context[Socket]") -> Iterator[Gatekeeper]:
    with Gatekeeper(context) as gatekeeper:
        yield gatekeeper


def server(context: "zmq.Context[Socket]", gatekeeper: Gatekeeper, allowed: set[str]) -> Socket:
    pull = data_socket(context, zmq.PULL)
    gatekeeper.guard(pull, SERVER, "data", allowed.__contains__)
    return pull


def client(context: "zmq.Context[Socket]", endpoint: str, keys: KeyPair | None, server_key: str) -> Socket:
    dealer = control_socket(context, zmq.PUSH)
    dealer.linger = 0
    if keys is not None:
        be_client(dealer, keys, server_key)
    connect(dealer, endpoint)
    send(dealer, Ping(7))
    return dealer


def test_the_allowed_key_gets_in_and_is_named(context, gatekeeper) -> None:  # type: ignore[no-untyped-def]
    """What arrives carries the key that its sender has proved to own."""
    with (
        server(context, gatekeeper, {FRIEND.public}) as pull,
        client(context, bind(pull, "tcp://127.0.0.1:*"), FRIEND, SERVER.public),
    ):
        assert pull.poll(60_000)
        frames = pull.recv_multipart(copy=False)
    assert sender_key(frames[0]) == FRIEND.public
    assert decode([frame.buffer for frame in frames], Plane.CONTROL) == (Ping(7), ())


@pytest.mark.parametrize(
    ("keys", "server_key"),
    [(STRANGER, SERVER.public), (None, ""), (FRIEND, STRANGER.public)],
    ids=["unknown key", "no keys", "another server pinned"],
)
def test_nobody_else_does(context, gatekeeper, keys, server_key) -> None:  # type: ignore[no-untyped-def]
    """An unknown key, a client without keys, and one that expects another server exchange no message."""
    with (
        server(context, gatekeeper, {FRIEND.public}) as pull,
        client(context, bind(pull, "tcp://127.0.0.1:*"), keys, server_key),
    ):
        assert not pull.poll(SILENCE_MS)


def test_without_a_gatekeeper_nobody_gets_in(context) -> None:  # type: ignore[no-untyped-def]
    """A handler that ended, or a rule that raises, opens no door."""
    gatekeeper = Gatekeeper(context)
    with server(context, gatekeeper, {FRIEND.public}) as pull:
        gatekeeper.close()
        gatekeeper.close()
        with client(context, bind(pull, "tcp://127.0.0.1:*"), FRIEND, SERVER.public):
            assert not pull.poll(SILENCE_MS)


def test_a_rule_that_fails_lets_nobody_in_and_the_next_one_counts(context, gatekeeper) -> None:  # type: ignore[no-untyped-def]
    """An exception in a rule is a no; a client that may retry gets in once the rule says yes."""
    allowed: set[str] = set()

    def rule(key: str) -> bool:
        if not allowed:
            raise RuntimeError("the list cannot be read")
        return key in allowed

    with data_socket(context, zmq.PULL) as pull, data_socket(context, zmq.PUSH) as push:
        gatekeeper.guard(pull, SERVER, "data", rule, may_retry=True)
        be_client(push, FRIEND, SERVER.public)
        connect(push, bind(pull, "tcp://127.0.0.1:*"))
        assert not push.poll(SILENCE_MS, zmq.POLLOUT)
        allowed.add(FRIEND.public)
        assert push.poll(60_000, zmq.POLLOUT)
        send(push, Ping(7))
        assert pull.poll(60_000)


def test_keys_are_checked_and_secrets_not_shown() -> None:
    """Malformed keys and pairs that do not belong together are refused; a secret is in no repr."""
    for text in ("", "x" * 39, "x" * 41, "'" * 40, "#" * 40, "\u00e9" * 40):
        with pytest.raises(SecurityError, match="no public key"):
            checked_key(text)
    assert checked_key(SERVER.public) == SERVER.public
    with pytest.raises(SecurityError, match="does not belong"):
        KeyPair(SERVER.public, FRIEND.secret)
    with pytest.raises(SecurityError, match="does not belong"):
        KeyPair(SERVER.public, "short")
    assert SERVER.secret not in repr(SERVER)
    assert all(new_key_pair().public[0].isalnum() for _ in range(50))
