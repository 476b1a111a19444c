"""Who has joined: the workers of this host, those of other hosts in their seats, and spares, which have none.

Shared by the control plane's thread and its callers; every method locks. Knows no sockets but as part of an address.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from coordinator.door import Door, Seat
from coordinator.eligibility import model_fault, own_fault, reach_fault, stranger_fault, version_fault
from coordinator.errors import LaunchError, WorkerAbsent
from coordinator.spares import choose_spare
from protocol.control import HostModel, Join, Leaving, Pong, Ready, Refused
from protocol.errors import SecurityError
from protocol.messages import Message
from protocol.records import with_changes
from protocol.sockets import Socket
from protocol.version import suits

SILENCE_LIMIT_S = 2.8
"""A serving worker that answered no ping for so long counts as lost. Its control thread answers during long steps."""
LOADING_SILENCE_LIMIT_S = 15.0
"""The same for one that starts or loads, when a disk or a whole machine may be stuck for a while."""
MAX_SPARES = 64
MAX_SPARES_OF_A_HOST = 16

NoteSink = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sender:
    """Where a worker is reached, the key it has proved to own and the IP address it comes from.

    Both are empty for a worker of this host.
    """

    router: Socket
    identity: bytes
    key: str = ""
    address: str = field(default="", compare=False)


@dataclass(slots=True)
class Member:
    """A worker that has joined."""

    sender: Sender
    join: Join
    is_assigned: bool = False
    is_serving: bool = False
    silent_s: float = 0.0
    pong: Pong | None = None
    left: str | None = None
    hangs: str | None = None
    """What it has not done for too long, although it answers."""

    @property
    def is_there(self) -> bool:
        """Whether it was heard of lately, as far as that can be said of one without a task."""
        return self.left is None and self.silent_s < SILENCE_LIMIT_S

    def note(self, message: Message) -> None:
        """Take in what it said."""
        self.silent_s = 0.0
        if isinstance(message, Pong):
            self.pong = message
            self.is_serving = message.state == "serving"
        elif isinstance(message, Ready):
            self.is_serving = True
        elif isinstance(message, Leaving):
            self.left = message.reason


@dataclass(slots=True)
class Roster:
    """Joined workers by the id of their stage.

    `own` are the ids under which workers of this host may join, each once, and only with a version of glmpipe that
    suits. Those of other hosts come in by the `door`, which has the seats. `on_note` hears of what people should know.
    """

    own: frozenset[str]
    door: Door | None
    on_note: NoteSink
    model: HostModel | None = None
    """What was launched; an empty fingerprint is not compared."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    workers: dict[str, Member] = field(default_factory=dict)
    spares: list[Member] = field(default_factory=list)
    _unreadable: str | None = None
    """What was last said to be wrong with the allow-list."""

    # -- who may join

    def admit_own(self, sender: Sender, join: Join) -> Refused | bool:
        """A worker of this host, which is never a spare."""
        with self.changed:
            if join.worker_id not in self.own or join.worker_id in self.workers:
                return Refused(join.request_id, "unknown_worker", f"no stage waits for a worker {join.worker_id!r}")
            if not suits(join.glmpipe_version):
                return self._refuse(join, "version", version_fault(f"worker {join.worker_id}", join))
            if (fault := own_fault(join)) is not None:
                return self._refuse(join, "join", f"worker {join.worker_id} says what cannot be: {fault}")
            self.workers[join.worker_id] = Member(sender, join)
            self.changed.notify_all()
        return False

    def admit_other(self, sender: Sender, join: Join) -> Refused | bool:
        """A worker of another host: who it is says its key, not what it calls itself. Whether it is a spare."""
        assert self.door is not None
        if self.door.unreadable() is not None:  # which is noted once a second at most, by `drop_revoked`
            return Refused(join.request_id, "no_seat", "the launching host's allow-list cannot be read at present")
        is_new = self.door.allowed.name_of(sender.key) is None
        try:
            name = self.door.admit(sender.key, join.token)
        except SecurityError as error:
            return self._refuse(join, "token", str(error))
        if name is None:
            return self._refuse(join, *stranger_fault(sender.key, join.token, self.door.tokens.used_by))
        if is_new:
            self.on_note(f"let in {name} by its token: its key {sender.key} is allowed from now on")
        join = with_changes(join, host=name, token=None)
        if not suits(join.glmpipe_version):
            return self._refuse(join, "version", version_fault(f"worker {join.worker_id} of {name}", join))
        fault = reach_fault(join, {sender.address, *self.door.allowed.addresses(name)})
        if fault is not None:
            return self._refuse(join, "join", f"a worker of {name} cannot be reached: {fault}")
        difference = None if self.model is None or join.model is None else model_fault(self.model, join.model, name)
        if difference is not None:
            return self._refuse(join, "model", difference)
        with self.changed:
            worker_id = self._seat_of(sender.key, join)
            if worker_id is None:
                return self._keep_as_spare(sender, join)
            known = self.workers.get(worker_id)
            if known is not None and known.join.public_key == join.public_key:
                known.sender, known.silent_s = sender, 0.0
            else:
                self.workers[worker_id] = Member(sender, join)
            self.changed.notify_all()
        return False

    def find(self, sender: Sender) -> tuple[str, Member] | None:
        """The worker that said something, and the id of its stage (empty for a spare); None for anybody else."""
        with self.changed:
            members = [*self.workers.items(), *(("", spare) for spare in self.spares)]
            found = next((entry for entry in members if entry[1].sender == sender), None)
        return found if found is not None and self._is_allowed(found[1]) else None

    def note(self, member: Member, message: Message) -> None:
        """Take in what a worker said."""
        with self.changed:
            member.note(message)
            if isinstance(message, Leaving):
                self.changed.notify_all()

    # -- who is there

    def wait_for_joins(self, deadline_s: float, check: Callable[[], None]) -> dict[str, Join]:
        """Block until every stage has a worker; `check` runs every 0.1 s and may raise.

        Workers of other hosts are waited for as long as it takes.

        Raises:
            LaunchError: some of this host have not within `deadline_s` seconds.
        """
        give_up_at = time.monotonic() + deadline_s
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._is_complete, timeout=0.1)
                self._seat_spares_at_home()
                joined = {worker_id: member.join for worker_id, member in self.workers.items()}
                is_complete = self._is_complete
            if is_complete:
                return joined
            check()
            absent = ", ".join(sorted(self.own - joined.keys()))
            if absent and time.monotonic() > give_up_at:
                raise LaunchError(f"{absent} did not join within {deadline_s:.0f} s; look at its log lines above")

    def await_own(self, deadline_s: float, dead: Callable[[], Collection[str]]) -> None:
        """Block until all of this host's workers but the `dead` have joined: one just started again is not lost."""
        give_up_at = time.monotonic() + deadline_s
        while self.own - self.joined().keys() - set(dead()) and time.monotonic() < give_up_at:
            with self.changed:
                self.changed.wait(timeout=0.1)

    def await_others(self, await_s: float, needed: Mapping[str, Join], check: Callable[[], None]) -> None:
        """Block until other hosts' workers are in all seats: those that come back, or from `await_s` on, spares.

        `needed` says, by stage, who was there before: a spare must have a device of that kind and as much memory.

        Raises:
            WorkerAbsent: nobody came, and no spare will do.
        """
        give_up_at = time.monotonic() + await_s
        while waiting := self.waiting_seats():
            if time.monotonic() >= give_up_at:
                self._seat_any_spare(waiting[0], needed.get(waiting[0].worker_id), await_s)
                continue
            check()
            with self.changed:
                self.changed.wait(0.1)

    def missing(self, needed: Mapping[str, Join]) -> tuple[Seat, ...]:
        """The seats without a worker for which no spare would do either; `needed` as for `await_others`."""
        with self.changed:
            spares = [spare.join for spare in self.spares if spare.is_there]
            missing = []
            for seat in self.waiting_seats():
                chosen = choose_spare(needed.get(seat.worker_id), spares)
                if chosen is None:
                    missing.append(seat)
                else:
                    spares = [spare for spare in spares if spare is not chosen]
        return tuple(missing)

    def joined(self) -> dict[str, Join]:
        """What each worker that has a stage said it has."""
        with self.changed:
            return {worker_id: member.join for worker_id, member in self.workers.items()}

    def close_seats(self, worker_ids: Collection[str]) -> None:
        """There are no such stages any more: nobody is waited for there, and nobody may join under these ids."""
        with self.changed:
            self.own -= frozenset(worker_ids)
            if self.door is not None:
                self.door.seats = tuple(seat for seat in self.door.seats if seat.worker_id not in worker_ids)

    def waiting_seats(self) -> tuple[Seat, ...]:
        """The stages that no other host's worker has taken yet."""
        if self.door is None:
            return ()
        with self.changed:
            self._seat_spares_at_home()
            return tuple(seat for seat in self.door.seats if seat.worker_id not in self.workers)

    def lost(self) -> dict[str, str]:
        """The ids of workers that left or fell silent, and what happened; empty while all are well."""
        found = {}
        with self.changed:
            for worker_id, worker in self.workers.items():
                if worker.left is not None:
                    found[worker_id] = f"left: {worker.left}"
                elif worker.hangs is not None:
                    found[worker_id] = worker.hangs
                elif worker.silent_s > (SILENCE_LIMIT_S if worker.is_serving else LOADING_SILENCE_LIMIT_S):
                    found[worker_id] = f"has been silent for {worker.silent_s:.1f} s"
        return found

    def give_up(self, worker_id: str, what: str) -> None:
        """It answers, but counts as lost: it has not done what it should have."""
        with self.changed:
            if worker_id in self.workers:
                self.workers[worker_id].hangs = what

    def forget(self, worker_id: str) -> Sender | None:
        """Another worker may join under this id; nothing the old one says is heard any more. Where that one was."""
        with self.changed:
            worker = self.workers.pop(worker_id, None)
        return None if worker is None else worker.sender

    def living(self) -> list[Sender]:
        """All who are to be asked whether they live."""
        with self.changed:
            return [member.sender for member in (*self.workers.values(), *self.spares) if member.left is None]

    def pongs(self) -> dict[str, Pong]:
        """The latest health report of each worker that gave one."""
        with self.changed:
            return {i: w.pong for i, w in self.workers.items() if w.pong is not None}

    # -- time passes

    def count_silence(self, waited_s: float) -> None:
        """Add up time spent waiting, not time passed: a launch that was itself stopped listens before it judges."""
        with self.changed:
            for member in (*self.workers.values(), *self.spares):
                member.silent_s += waited_s

    def drop_gone_spares(self) -> None:
        """Spares that left or fell silent are none any more."""
        with self.changed:
            gone = [s for s in self.spares if s.left is not None or s.silent_s > LOADING_SILENCE_LIMIT_S]
            self.spares = [spare for spare in self.spares if spare not in gone]
        for spare in gone:
            self.on_note(f"the spare worker {spare.join.device} of {spare.join.host} is gone")

    def drop_revoked(self) -> list[Sender]:
        """Workers whose key is no longer allowed are lost at once; who is to be told.

        Nobody is while it cannot be read who is allowed, which is said once.
        """
        unreadable = None if self.door is None else self.door.unreadable()
        if unreadable is not None and unreadable != self._unreadable:
            self.on_note(f"who has joined may stay, but nobody else comes in: {unreadable}")
        self._unreadable = unreadable
        with self.changed:
            members = (*self.workers.values(), *self.spares)
            revoked = [member for member in members if member.left is None and not self._is_allowed(member)]
            for worker in revoked:
                worker.left = f"the key of {worker.join.host} has been revoked"
        return [worker.sender for worker in revoked]

    # -- in these, `changed` is held

    @property
    def _is_complete(self) -> bool:
        return len(self.workers) == len(self.own) + (0 if self.door is None else len(self.door.seats))

    def _is_allowed(self, member: Member) -> bool:
        if not member.sender.key or self.door is None:
            return True
        return self.door.still_allows(member.sender.key, member.join.host)

    def _seat_of(self, key: str, join: Join) -> str | None:
        """The seat of a worker that comes again, or else one that is free or was left before it had anything to do."""
        assert self.door is not None
        for worker_id, worker in self.workers.items():
            if (worker.sender.key, worker.join.public_key) == (key, join.public_key) and worker.left is None:
                return worker_id
        taken = [worker_id for worker_id, worker in self.workers.items() if worker.is_assigned or worker.is_there]
        seat = self.door.seat_for(join.host, join.device, taken)
        return None if seat is None else seat.worker_id

    def _keep_as_spare(self, sender: Sender, join: Join) -> Refused | bool:
        who = (sender.key, join.public_key)  # what it proved, and which of its processes it says to be
        known = [spare for spare in self.spares if (spare.sender.key, spare.join.public_key) == who]
        others = [spare for spare in self.spares if spare not in known]
        of_host = sum(spare.sender.key == sender.key for spare in others)
        if len(others) >= MAX_SPARES or of_host >= MAX_SPARES_OF_A_HOST:
            there = f"{of_host} spare workers of that host and {len(others)} in all are there already"
            text = f"no stage waits for {join.device} of {join.host}, and {there}"
            return Refused(join.request_id, "no_seat", text)
        self.spares = [*others, Member(sender, join)]
        if not known:
            self.on_note(f"{join.device} of {join.host} has joined beyond the plan: held as a spare worker")
        return True

    def _seat_spares_at_home(self) -> None:
        """A seat that is free is for whoever of its host has such a device."""
        for seat in () if self.door is None else self.door.seats:
            at_home = [
                s for s in self.spares if (s.join.host, s.join.device) == (seat.host, seat.device) and s.is_there
            ]
            if seat.worker_id not in self.workers and at_home:
                self._seat(seat, at_home[0])

    def _seat(self, seat: Seat, spare: Member) -> None:
        assert self.door is not None
        self.spares.remove(spare)
        self.door.give_seat(seat.worker_id, spare.join.host, spare.join.device)
        self.workers[seat.worker_id] = spare
        self.changed.notify_all()

    # -- these lock

    def _seat_any_spare(self, seat: Seat, needed: Join | None, awaited_s: float) -> None:
        """Raises WorkerAbsent when no spare will do."""
        with self.changed:
            spares = [spare for spare in self.spares if spare.is_there]
            chosen = choose_spare(needed, [spare.join for spare in spares])
            if chosen is None:
                others = f"{len(spares)} spare workers have another kind of device or less memory" if spares else ""
                raise WorkerAbsent(
                    f"{seat.text} did not come back within {awaited_s:g} s, and "
                    f"{others or 'no spare worker has joined'}; start its worker again, or one on another host"
                )
            self._seat(seat, next(spare for spare in spares if spare.join is chosen))
        self.on_note(f"{chosen.device} of {chosen.host}, a spare worker, takes the place of {seat.text}")

    def _refuse(self, join: Join, code: str, text: str) -> Refused:
        self.on_note(f"refused a worker of {join.host}: {text}")
        return Refused(join.request_id, code, text)
