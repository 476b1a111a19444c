"""A peer that is let in and sends one message without end.

    python -m tests.end_to_end.endless_message PLANE ENDPOINT SERVER_KEY PUBLIC SECRET

Ends when its connection is ended. (The message has an end, behind sixteen gigabytes.)
"""

import sys

import zmq
from zmq.utils.monitor import recv_monitor_message

from protocol.security import KeyPair, be_client
from protocol.sockets import connect, control_socket, data_socket

FRAME_BYTES, NUM_FRAMES = 2**16, 2**18
DEADLINE_MS = 300_000


def main() -> int:
    plane, endpoint, server_key, public, secret = sys.argv[1:]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    peer = control_socket(context, zmq.DEALER) if plane == "control" else data_socket(context, zmq.PUSH)
    be_client(peer, KeyPair(public, secret), server_key)
    monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    connect(peer, endpoint)
    assert peer.poll(DEADLINE_MS, zmq.POLLOUT), "not let in"
    frame = zmq.Frame(bytes(FRAME_BYTES))  # the same one again and again: it costs no memory here
    for _ in range(NUM_FRAMES):
        peer.send(frame, zmq.SNDMORE, copy=False)
    peer.send(b"the end")
    assert monitor.poll(DEADLINE_MS), "nobody ended the connection"
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
    context.destroy(linger=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
