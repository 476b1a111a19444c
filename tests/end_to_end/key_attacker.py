"""Peers of the sockets with keys who mean harm: strangers of every kind, and one that is let in.

    python -m tests.end_to_end.key_attacker SEED NUM CONTROL SERVER_KEY PUBLIC SECRET DATA ...

The last key pair is on the allow-list. Says, as JSON on one line, how many messages the one that is let in got rid of,
and how many connections the strangers made.
"""

import contextlib
import json
import sys
from random import Random

import zmq

from protocol.messages import Plane
from protocol.security import KeyPair, be_client, new_key_pair
from protocol.sockets import connect, control_socket, data_socket
from tests.end_to_end.attacker import messages, say, strangers


def main() -> int:
    """Attack in rounds."""
    seed, num_rounds, control, server_key, public, secret, *data = sys.argv[1:]
    rng, context, num_sent, num_connections = Random(int(seed)), zmq.Context(), 0, 0
    friend = KeyPair(public, secret)
    with _dealer(context, control, friend, server_key) as peer:
        for number in range(int(num_rounds)):
            if number % 20 == 0:
                for endpoint in (control, *data):
                    num_connections += strangers(endpoint, rng, 10)
                    num_connections += flood_with_wrong_keys(context, endpoint, server_key, rng)
            num_sent += sum(say(peer, frames) for frames in messages(Plane.CONTROL, rng))
            if number % 50 == 49:  # in the middle of a message, then once more from the beginning
                with _dealer(context, control, friend, server_key) as other, contextlib.suppress(zmq.Again):
                    other.send(b"half of it", zmq.SNDMORE)
    context.destroy(linger=0)
    print(json.dumps({"sent": num_sent, "connections": num_connections}))
    return 0


def flood_with_wrong_keys(
    context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, server_key: str, rng: Random
) -> int:
    """A key that nobody knows with the right key of the server and with a wrong one, passwords, no keys at all."""
    with contextlib.ExitStack() as stack:
        for kind in range(8):
            peer = stack.enter_context(data_socket(context, zmq.PUSH))
            peer.immediate = 0
            peer.sndtimeo = 20
            if kind % 4 < 2:
                be_client(peer, new_key_pair(), server_key if kind % 4 else new_key_pair().public)
            elif kind % 4 == 2:
                peer.plain_username, peer.plain_password = b"root", rng.randbytes(16)
            connect(peer, endpoint)
            for _ in range(20):
                say(peer, [rng.randbytes(2**12)])
    return 8


def _dealer(
    context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, keys: KeyPair, server_key: str
) -> "zmq.Socket[bytes]":
    dealer = control_socket(context, zmq.DEALER)
    be_client(dealer, keys, server_key)
    dealer.linger = 0
    dealer.sndtimeo = 500
    connect(dealer, endpoint)
    return dealer


if __name__ == "__main__":
    sys.exit(main())
