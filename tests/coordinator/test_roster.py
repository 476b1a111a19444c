"""Who has a stage, who is a spare, and who takes whose place."""

import hashlib

import pytest
import zmq
from zmq.utils import z85

from coordinator import roster
from coordinator.door import Door, Seat
from coordinator.errors import WorkerAbsent
from coordinator.roster import Roster, Sender
from coordinator.spares import choose_spare
from protocol.control import HostModel, Join, Leaving, Refused
from protocol.key_files import KeyDirectory
from protocol.records import with_changes
from protocol.security import new_key_pair
from protocol.sockets import Socket
from protocol.version import VERSION

SEATS = (Seat("stage-1", "lab2", "cpu"), Seat("stage-2", "lab3", "cuda:0"))
ROUTER: Socket = zmq.Socket(zmq.Context.instance(), zmq.ROUTER)
ROUTER.close()


def process_key(text: str) -> str:
    """A public key, always the same for the same text."""
    return z85.encode(hashlib.sha256(text.encode()).digest()).decode()


class Host:
    """A name on the allow-list and what its workers say."""

    def __init__(self, keys: KeyDirectory, name: str) -> None:
        self.name = name
        self.key = new_key_pair().public
        keys.allowed.add(name, self.key)

    def sender(self, identity: bytes = b"1") -> Sender:
        return Sender(ROUTER, self.name.encode() + identity, self.key, "192.0.2.1")

    def join(
        self,
        device: str = "cpu",
        memory: int = 8,
        process: str = "a",
        version: str = VERSION,
        model: HostModel | None = None,
    ) -> Join:
        facts = ("2.13", "name", 1, device, "a device", memory, memory, 1, (), "tcp://192.0.2.1:1")
        key = process_key(f"{self.name} {process}")
        return Join(7, "cpu-1", version, *facts, key, True, None, model)  # type: ignore[arg-type]


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def people(keys: KeyDirectory, notes: list[str]) -> Roster:
    return Roster(frozenset(), Door("tcp://192.0.2.1:7410", keys, SEATS), notes.append)


def test_who_has_no_seat_is_a_spare_and_said_so(people: Roster, keys: KeyDirectory, notes: list[str]) -> None:
    """A second worker of a seat's host, and one of a host that the plan does not name; each is noted once."""
    lab2, lab5 = Host(keys, "lab2"), Host(keys, "lab5")
    assert people.admit_other(lab2.sender(), lab2.join()) is False
    assert people.admit_other(lab2.sender(b"2"), lab2.join(process="b")) is True
    for _ in range(2):
        assert people.admit_other(lab5.sender(), lab5.join()) is True
    assert notes == [f"cpu of {name} has joined beyond the plan: held as a spare worker" for name in ("lab2", "lab5")]
    assert [seat.worker_id for seat in people.waiting_seats()] == ["stage-2"]
    assert len(people.living()) == 3


def test_a_token_that_somebody_else_used_is_told_to_both_sides(
    people: Roster, keys: KeyDirectory, notes: list[str]
) -> None:
    """Whom it let in says the launch; who comes later with it hears by which key it was used, and what to do."""
    assert people.door is not None
    token, thief, rightful = people.door.tokens.issue("lab2"), new_key_pair().public, new_key_pair().public
    join = with_changes(Host(keys, "lab3").join(), token=token)
    assert people.admit_other(Sender(ROUTER, b"1", thief, "192.0.2.1"), join) is False
    assert notes == [f"let in lab2 by its token: its key {thief} is allowed from now on"]
    refused = people.admit_other(Sender(ROUTER, b"2", rightful), join)
    assert isinstance(refused, Refused) and refused.code == "token"
    for text in (refused.text, notes[-1]):
        assert f"used before, by the key {thief}" in text and f"glmpipe keys revoke '{thief}'" in text
        assert "keys allow" not in text
    wrong = people.admit_other(Sender(ROUTER, b"3", rightful), with_changes(join, token="wrong"))
    assert isinstance(wrong, Refused) and wrong.code == "token" and "wrong or too old" in wrong.text


def test_no_spare_takes_anothers_place_by_its_name(people: Roster, keys: KeyDirectory) -> None:
    """What a process says its key is counts for nothing beside the key that its host has proved to own."""
    lab5, lab6 = Host(keys, "lab5"), Host(keys, "lab6")
    people.admit_other(lab5.sender(), lab5.join())
    people.admit_other(lab6.sender(), with_changes(lab6.join(), public_key=lab5.join().public_key))
    assert people.living() == [lab5.sender(), lab6.sender()]


def test_a_spare_of_the_same_host_and_device_needs_no_waiting(people: Roster, keys: KeyDirectory) -> None:
    """When its neighbour's seat becomes free it has it."""
    lab2 = Host(keys, "lab2")
    people.admit_other(lab2.sender(), lab2.join())
    people.admit_other(lab2.sender(b"2"), lab2.join(process="b"))
    people.forget("stage-1")
    assert [seat.worker_id for seat in people.waiting_seats()] == ["stage-2"]
    assert people.workers["stage-1"].join.public_key == process_key("lab2 b")
    assert people.spares == []


def test_a_spare_takes_the_place_of_one_that_does_not_come_back(
    people: Roster, keys: KeyDirectory, notes: list[str]
) -> None:
    """Only when the wait is over; the one that comes back later is a spare itself."""
    lab3, lab5 = Host(keys, "lab3"), Host(keys, "lab5")
    lab2 = Host(keys, "lab2")
    people.admit_other(lab2.sender(), lab2.join())
    people.admit_other(lab3.sender(), lab3.join("cuda:0"))
    people.admit_other(lab5.sender(), lab5.join("cuda:1"))
    served = {"stage-2": people.workers["stage-2"].join}
    assert people.missing(served) == ()
    assert people.forget("stage-2") == lab3.sender()
    people.await_others(0.0, served, lambda: None)
    assert notes[-1] == "cuda:1 of lab5, a spare worker, takes the place of stage 2 (cuda:0 of lab3)"
    assert people.workers["stage-2"].join.host == "lab5"
    assert people.admit_other(lab3.sender(b"2"), lab3.join("cuda:0")) is True
    assert people.door is not None and people.door.seats[1] == Seat("stage-2", "lab5", "cuda:1")


def test_without_a_spare_that_will_do_the_wait_ends_with_a_reason(people: Roster, keys: KeyDirectory) -> None:
    """It names the stage, the host, the seconds, and why the spares will not do."""
    lab2, lab3, lab5 = (Host(keys, name) for name in ("lab2", "lab3", "lab5"))
    people.admit_other(lab2.sender(), lab2.join())
    served = {"stage-2": lab3.join("cuda:0")}
    with pytest.raises(WorkerAbsent, match=r"stage 2 \(cuda:0 of lab3\) did not come back within 0 s, and no spare"):
        people.await_others(0.0, served, lambda: None)
    people.admit_other(lab5.sender(), lab5.join("cpu", memory=99))
    assert people.missing(served) == (SEATS[1],)
    with pytest.raises(WorkerAbsent, match="1 spare workers have another kind of device or less memory"):
        people.await_others(0.0, served, lambda: None)


def test_spares_that_are_gone_are_no_spares(people: Roster, keys: KeyDirectory, notes: list[str]) -> None:
    """One says goodbye, one falls silent, one's key is revoked: none of them is seated."""
    for number in (5, 6, 7):
        host = Host(keys, f"lab{number}")
        people.admit_other(host.sender(), host.join("cuda:0"))
    people.note(people.spares[0], Leaving(0, "SIGTERM"))
    people.spares[1].silent_s = roster.LOADING_SILENCE_LIMIT_S + 1
    keys.allowed.remove("lab7")
    assert [sender.identity for sender in people.drop_revoked()] == [b"lab71"]
    people.drop_gone_spares()
    assert people.spares == []
    assert len([note for note in notes if note.endswith("is gone")]) == 3


def test_nobody_is_put_out_while_the_list_cannot_be_read(people: Roster, keys: KeyDirectory, notes: list[str]) -> None:
    """Those who joined stay and are heard, others wait outside; it is said once, and revocation works afterwards."""
    lab2, lab3 = Host(keys, "lab2"), Host(keys, "lab3")
    people.admit_other(lab2.sender(), lab2.join())
    file = keys.path / "allowed" / "lab3.pub"
    file.chmod(0o644)
    for _ in range(3):
        assert people.drop_revoked() == []
    assert people.find(lab2.sender()) is not None and people.lost() == {}
    refused = people.admit_other(lab3.sender(), lab3.join("cuda:0"))
    assert isinstance(refused, Refused) and refused.code == "no_seat"  # it asks again
    assert len(notes) == 1 and f"chmod 600 {file}" in notes[0] and str(file) not in refused.text
    file.chmod(0o600)
    keys.allowed.remove("lab2")
    assert people.drop_revoked() == [lab2.sender()]
    assert people.admit_other(lab3.sender(), lab3.join("cuda:0")) is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"public_key": "lab2"}, "'lab2' is no public key"),
        ({"data_endpoint": "tcp://192.0.2.1:99999"}, "port 99999"),
        ({"data_endpoint": "tcp://192.0.2.1:0"}, "no address and port"),
        ({"data_endpoint": "tcp://lab2:7500"}, "no IP address"),
        ({"data_endpoint": "ipc:///tmp/worker-1"}, "no address and port"),
        ({"is_guarded": False}, "demands no keys"),
        ({"data_endpoint": "tcp://127.0.0.1:7500"}, "it says to be at 127.0.0.1, and comes from 192.0.2.1"),
        ({"data_endpoint": "tcp://192.0.2.2:7500"}, "keys allow lab2 'ITS KEY' --address 192.0.2.2"),
        ({"data_endpoint": "tcp://[::1]:7500"}, "it says to be at ::1"),
        ({"device": "cuda:\x1b[2J"}, "is no device"),
        ({"device": "cuda:0" + "0" * 250}, "is no device"),
    ],
)
def test_whoever_cannot_be_connected_to_is_refused(
    people: Roster, keys: KeyDirectory, notes: list[str], changes: dict[str, object], words: str
) -> None:
    """Its neighbours would fail in its place. The seat stays free for one that can."""
    lab2 = Host(keys, "lab2")
    refused = people.admit_other(lab2.sender(), with_changes(lab2.join(), **changes))
    assert isinstance(refused, Refused) and refused.code == "join"
    assert words in refused.text and "lab2" in notes[0]
    assert people.admit_other(lab2.sender(), lab2.join()) is False


def test_one_host_cannot_take_up_all_room_for_spares(people: Roster, keys: KeyDirectory) -> None:
    """It may have so many; another host's still come in, and one of its own that connects anew does."""
    lab5, lab6 = Host(keys, "lab5"), Host(keys, "lab6")
    for number in range(roster.MAX_SPARES_OF_A_HOST):
        assert people.admit_other(lab5.sender(b"%d" % number), lab5.join(process=str(number))) is True
    refused = people.admit_other(lab5.sender(b"x"), lab5.join(process="x"))
    assert isinstance(refused, Refused) and refused.code == "no_seat"
    assert people.admit_other(lab5.sender(b"y"), lab5.join(process="0")) is True
    assert people.admit_other(lab6.sender(), lab6.join()) is True


def test_another_version_is_refused_with_both_names(people: Roster, keys: KeyDirectory, notes: list[str]) -> None:
    """The worker and the launch are told which host, which versions and what to do."""
    lab2 = Host(keys, "lab2")
    major, minor, *_ = VERSION.split(".")
    assert people.admit_other(lab2.sender(), lab2.join(version=f"{major}.{minor}.99")) is False
    refused = people.admit_other(lab2.sender(), lab2.join(version="9.9.9"))
    assert isinstance(refused, Refused) and refused.code == "version"
    for text in (refused.text, notes[0]):
        assert "lab2" in text and "9.9.9" in text and VERSION in text


def test_another_model_is_refused_with_what_differs(keys: KeyDirectory, notes: list[str]) -> None:
    """Its layers, or its fingerprint; of whoever was told no model nothing is known yet."""
    door = Door("tcp://192.0.2.1:7410", keys, SEATS)
    people = Roster(frozenset(), door, notes.append, HostModel("chatglm-6b", "abc", 28))
    lab2 = Host(keys, "lab2")
    for model, words in (
        (HostModel("/m", "xyz", 40), "/m of lab2 has 40 layers, the launched model chatglm-6b 28"),
        (HostModel("/m", "xyz", 28), "/m of lab2 is not the launched model chatglm-6b (fingerprint xyz, wanted abc)"),
    ):
        refused = people.admit_other(lab2.sender(), lab2.join(model=model))
        assert isinstance(refused, Refused) and refused.code == "model"
        assert words in refused.text and words in notes[-1]
    assert people.admit_other(lab2.sender(), lab2.join(model=HostModel("/m", "abc", 28))) is False
    assert people.admit_other(lab2.sender(b"2"), lab2.join(process="b")) is True


def test_the_smallest_spare_that_suffices_is_chosen() -> None:
    """Of the lost one's kind of device; the same memory will do."""

    def spare(device: str, memory: int) -> Join:
        facts = ("2.13", "name", 1, device, "a device", memory, memory, 1, (), "tcp://192.0.2.1:1")
        return Join(7, "x", VERSION, *facts, "key", True, None, None)  # type: ignore[arg-type]

    needed = spare("cuda:0", 8)
    small, same, large, cpu = spare("cuda:0", 7), spare("cuda:1", 8), spare("cuda:0", 24), spare("cpu", 64)
    assert choose_spare(needed, [large, cpu, same, small]) is same
    assert choose_spare(needed, [small, cpu, large]) is large
    assert choose_spare(needed, [small, cpu]) is None
    assert choose_spare(spare("cpu", 64), [large, cpu]) is cpu
    assert choose_spare(None, [small]) is small and choose_spare(None, []) is None


def test_a_worker_that_was_just_started_again_is_waited_for(keys: KeyDirectory) -> None:
    """A dead one is not, nor one that does not join within the time there is."""
    people = Roster(frozenset({"stage-1", "stage-2"}), None, print)
    join = with_changes(Host(keys, "lab2").join(), worker_id="stage-1")
    asked: list[int] = []

    def dead() -> set[str]:
        asked.append(1)
        if len(asked) == 3:
            people.admit_own(Sender(ROUTER, b"1", ""), join)
        return {"stage-2"}

    people.await_own(60.0, dead)
    assert len(asked) == 4
    people.await_own(0.0, set)
    assert "stage-2" not in people.joined()


def test_a_worker_of_this_host_is_reached_where_it_says(notes: list[str]) -> None:
    """An address that nobody can connect to, a device that is none: refused, and another one may still come."""
    people = Roster(frozenset({"stage-1"}), None, notes.append)
    facts = ("2.13", "name", 1, "cpu", "a device", 8, 8, 1, (), "ipc:///run/worker-1")
    join = Join(7, "stage-1", VERSION, *facts, "key", False, None, None)  # type: ignore[arg-type]
    for changes in (
        {"data_endpoint": "tcp://192.0.2.1:1"},
        {"data_endpoint": ""},
        {"is_guarded": True},
        {"device": ""},
    ):
        refused = people.admit_own(Sender(ROUTER, b"1"), with_changes(join, **changes))
        assert isinstance(refused, Refused) and refused.code == "join", changes
    assert len(notes) == 4 and people.admit_own(Sender(ROUTER, b"1"), join) is False


def test_a_host_with_two_addresses_may_say_so(people: Roster, keys: KeyDirectory) -> None:
    """It joins from one and listens at another, which the launching host has allowed."""
    lab2 = Host(keys, "lab2")
    join = with_changes(lab2.join(), data_endpoint="tcp://10.0.0.2:7500")
    assert isinstance(people.admit_other(lab2.sender(), join), Refused)
    keys.allowed.add("lab2", lab2.key, ["10.0.0.2"])
    assert people.admit_other(lab2.sender(), join) is False
