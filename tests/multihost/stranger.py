"""What somebody without a key tries from another host: `python stranger.py ADDRESS...` prints a JSON object.

For every address, the ports that accept a connection, and of each, what it answered to ZMTP without keys, and whether
it shook hands with a key that nobody knows (whose owner has the right key of the server, if one is given after `=`).
"""

import json
import socket
import sys
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x04\x26\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def open_ports(address: str) -> list[int]:
    found = []
    for port in range(1, 65536):
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((address, port)) == 0:
                found.append(port)
    return found


def without_keys(address: str, port: int) -> str:
    """All that comes back, as text with one character a byte."""
    answer = b""
    with socket.create_connection((address, port), timeout=2.0) as connection:
        try:
            connection.sendall(GREETING + READY)
            while piece := connection.recv(4096):
                answer += piece
        except OSError:
            pass
    return answer.decode("latin-1")


def with_unknown_key(address: str, port: int, server_key: str) -> bool:
    """Whether the handshake succeeded within two seconds."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.curve_serverkey = server_key.encode()
    dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    dealer.connect(f"tcp://{address}:{port}")
    give_up_at = time.monotonic() + 2.0
    succeeded = False
    while not succeeded and time.monotonic() < give_up_at:
        succeeded = bool(monitor.poll(100)) and bool(recv_monitor_message(monitor))
    dealer.disable_monitor()
    monitor.close()
    dealer.close()
    context.term()
    return succeeded


def main(targets: list[str]) -> None:
    report = {}
    for target in targets:
        address, _, server_key = target.partition("=")
        key = server_key or zmq.curve_keypair()[0].decode()
        report[address] = {
            port: {"null": without_keys(address, port), "curve": with_unknown_key(address, port, key)}
            for port in open_ports(address)
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
