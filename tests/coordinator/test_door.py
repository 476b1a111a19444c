"""The door for other hosts: tokens, seats, and what a launch says while it waits."""

import threading
from pathlib import Path

import pytest

from coordinator.door import TOKEN_LIFE_S, Door, Seat, Tokens, data_endpoint, guarded_endpoints, listen_endpoint
from protocol.errors import EndpointError, SecurityError
from protocol.key_files import KeyDirectory
from protocol.security import new_key_pair

SEATS = (Seat("stage-1", "lab2", "cpu"), Seat("stage-2", "lab2", "cuda:0"), Seat("stage-4", "lab3", "cpu"))


@pytest.fixture
def door(keys: KeyDirectory) -> Door:
    return Door("tcp://192.0.2.1:7410", keys, SEATS)


def test_a_token_is_good_once_and_for_a_while() -> None:
    """Used, wrong and old tokens are nothing; each belongs to one host."""
    now_s = 0.0
    tokens = Tokens(lambda: now_s)
    first, second = tokens.issue("lab2"), tokens.issue("lab3")
    assert tokens.redeem(first + "0", "a") is None
    assert tokens.redeem("\u00e9", "a") is None
    assert tokens.used_by(first) is None
    assert tokens.redeem(first, "a") == "lab2"
    assert tokens.redeem(first, "b") is None
    assert tokens.hosts() == {"lab3"}
    assert (tokens.used_by(first), tokens.used_by(second), tokens.used_by("x")) == ("a", None, None)
    now_s = TOKEN_LIFE_S + 1
    assert tokens.redeem(second, "a") is None
    assert tokens.hosts() == set() and not tokens.any_known() and tokens.used_by(first) is None


def test_tokens_are_safe_to_use_from_several_threads() -> None:
    """Two that ask for hosts all the while lose no token that a third issues, and each is redeemed once."""
    tokens, is_over = Tokens(), threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            tokens.hosts()

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        issued = {tokens.issue(f"lab{number}"): f"lab{number}" for number in range(300)}
        assert {token: tokens.redeem(token, "a") for token in issued} == issued
    finally:
        is_over.set()
        for asker in askers:
            asker.join()
    assert tokens.hosts() == set()


def test_strangers_may_connect_only_while_a_token_is_out(door: Door) -> None:
    """And joining with it puts their key on the list, for good; without it they stay strangers.

    For the same while whoever comes with it too late is heard, to be told so.
    """
    stranger, other = new_key_pair().public, new_key_pair().public
    assert not door.may_connect(stranger)
    token = door.tokens.issue("lab2")
    assert door.may_connect(stranger)
    assert door.admit(stranger, None) is None
    assert door.admit(stranger, token) == "lab2"
    assert door.may_connect(stranger) and door.admit(stranger, None) == "lab2"
    assert door.admit(other, token) is None
    door.allowed.remove("lab2")
    assert door.may_connect(other) and door.tokens.used_by(token) == stranger
    assert door.admit(stranger, None) is None and door.admit(stranger, token) is None


def test_a_worker_gets_a_stage_of_its_host_and_device(door: Door) -> None:
    """The first free one; none for a device that the plan does not use there."""
    assert door.seat_for("lab2", "cuda:0", ()) == SEATS[1]
    assert door.seat_for("lab2", "cuda:0", ("stage-2",)) is None
    assert door.seat_for("lab3", "cuda:0", ()) is None


def test_what_to_run_elsewhere_is_told(door: Door) -> None:
    """One command for a device; a token only for hosts without a key, and printed once."""
    door.allowed.add("lab3", new_key_pair().public)
    lines = door.waiting_lines(SEATS)
    assert lines[0] == "waiting for lab2: stage 1 (cpu), stage 2 (cuda:0)"
    assert lines[1].startswith("  there: glmpipe worker --join tcp://192.0.2.1:7410 --key ")
    assert lines[1].endswith("--device cpu") and lines[2].endswith("--device cuda:0")
    assert "--token-file - " in lines[1] and "--token-file - " in lines[2]
    token = lines[3].rpartition(": ")[2]
    assert lines[3].startswith("  which asks for this token, good once, for 15 minutes: ")
    assert "token" not in lines[5] and token not in lines[1] + lines[2]
    again = "\n".join(door.waiting_lines(SEATS))
    assert token not in again and "given above" in again


def test_a_token_is_in_no_log(keys: KeyDirectory, tmp_path: Path) -> None:
    """Where lines are kept, they name a file that its owner alone may read, and that goes once it was used."""
    door = Door("tcp://192.0.2.1:7410", keys, SEATS, tmp_path)
    lines = "\n".join(door.waiting_lines(SEATS))
    path = tmp_path / "token-lab2"
    assert f"which asks for the token that is in {path}, good once" in lines
    assert path.stat().st_mode & 0o777 == 0o600
    token = path.read_text().strip()
    assert token not in lines and len(token) == 32
    assert door.admit(new_key_pair().public, token) == "lab2"
    assert not path.exists() and (tmp_path / "token-lab3").exists()


def test_a_list_that_cannot_be_read_is_waited_for(door: Door) -> None:
    """What is wrong is told in place of commands, which are there again when it is mended."""
    door.allowed.add("lab3", new_key_pair().public)
    file = door.allowed.path / "lab3.pub"
    file.chmod(0o644)
    (line,) = door.waiting_lines(SEATS[2:])
    assert line.startswith("waiting for stage 4 (cpu of lab3), but nobody comes in: ") and f"chmod 600 {file}" in line
    file.chmod(0o600)
    assert len(door.waiting_lines(SEATS[2:])) == 2


def test_a_door_needs_a_key(tmp_path: Path) -> None:
    """Without one nothing is bound, and the remedy is told."""
    with pytest.raises(SecurityError, match="glmpipe keys new"):
        Door("tcp://192.0.2.1:7410", KeyDirectory(tmp_path / "none"), SEATS)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://192.0.2.1", "tcp://192.0.2.1:7410"),
        ("tcp://192.0.2.1:5000", "tcp://192.0.2.1:5000"),
        ("tcp://[fd00::1]", "tcp://[fd00::1]:7410"),
        ("tcp://[fd00::1]:5000", "tcp://[fd00::1]:5000"),
    ],
)
def test_the_port_may_be_left_out(text: str, endpoint: str) -> None:
    """Then it is the usual one."""
    assert listen_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text", ["tcp://0.0.0.0", "tcp://lab1", "tcp://192.0.2.1:*", "ipc:///tmp/x", "tcp://1.2.3.4:0"]
)
def test_others_must_be_able_to_come(text: str) -> None:
    """One address and one port, or nobody could be told where to join."""
    with pytest.raises(EndpointError):
        listen_endpoint(text)


def test_only_hops_from_other_hosts_are_listened_for() -> None:
    """The declared ports: the way back first, then this host's stages that follow another host's."""
    listening = "tcp://192.0.2.1:7410"
    assert guarded_endpoints((None, None), listening) == {}
    assert guarded_endpoints((None, "lab2", None), listening) == {2: "tcp://192.0.2.1:7414"}
    assert guarded_endpoints((None, "lab2"), listening) == {2: "tcp://192.0.2.1:7411"}
    assert data_endpoint("tcp://192.0.2.1:7410", 0) == "tcp://192.0.2.1:7411"
