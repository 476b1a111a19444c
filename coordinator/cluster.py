"""The workers of one plan, on this host and on others: brought up, assigned their layers, watched, taken down."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import zmq

from coordinator.assigning import assignment
from coordinator.closing import Closing
from coordinator.cluster_settings import AWAIT_WORKER_S, ClusterSettings, Listening, ProgressSink
from coordinator.control import ControlPlane
from coordinator.door import Door, Seat, guarded_endpoints
from coordinator.errors import ClosedError, ReplanError, StageLost, StepStuck, WorkerAbsent
from coordinator.first_step import send_first_step
from coordinator.launcher import Launcher, LogSink
from coordinator.loading import Loading
from coordinator.pipeline import Pipeline
from coordinator.plan import Plan
from coordinator.recovery import next_try
from coordinator.replanning import Remaining, Replanned, checked_hosts
from coordinator.reply import Reply, expect, inspected_whole
from coordinator.roster import NoteSink
from coordinator.runtime_dir import RuntimeDir
from coordinator.signals import signals_deferred
from coordinator.whereabouts import IDLE_HEARTBEATS, MOST_IDLE_BYTES, IdleWatch, Place, locate
from glm.signals import undone_at_signals
from protocol.control import HostModel, Inspect, InspectedPart, Join, Ping, Pong, Progress, Ready
from protocol.descriptors import raise_descriptor_limit
from protocol.sockets import Socket

JOIN_DEADLINE_S = 120.0
"""Python and torch take seconds to start, a minute on a slow disk."""
REQUEST_DEADLINE_S = 60.0
WAITING_NOTE_S = 60.0
"""How often a launch says which other hosts it waits for."""


class Cluster(Closing):
    """One worker per stage, and the pipeline through them. A context manager: nothing is left when it closes."""

    def __init__(
        self,
        plan: Plan,
        settings: ClusterSettings,
        on_progress: ProgressSink | None = None,
        on_log: LogSink | None = None,
        on_note: NoteSink | None = None,
        listening: Listening | None = None,
        runtime_dir: RuntimeDir | None = None,
    ) -> None:
        """Start the workers; `load` makes them ready. `runtime_dir`, if given, is closed with the cluster.

        Raises:
            LaunchError: a worker cannot be started. ProtocolError: other hosts cannot be listened to.
        """
        self.plan = plan
        self._on_note = on_note or (lambda _: None)
        self._note_due_s = 0.0
        self.ready: tuple[Ready, ...] = ()
        self.is_closing = False
        """Set by whoever wants it closed while another thread waits for its stages."""
        self.meanwhile: Callable[[], None] = lambda: None
        """Called about every 0.1 s by whoever waits here for stages that do not serve yet."""
        self._is_up = False
        self._idle = IdleWatch()
        self._joins: tuple[Join, ...] = ()
        self._loading = Loading(self._name, on_progress)
        self._settings = settings
        self._await_worker_s = AWAIT_WORKER_S if listening is None else listening.await_worker_s
        self._patience_s = self._await_worker_s
        self._served: dict[str, Join] = {}
        """Who had which stage before the last loss."""
        with ExitStack() as stack:
            with signals_deferred():
                self.runtime_dir = stack.enter_context(runtime_dir or RuntimeDir())
                self._bring_up(stack, on_log, listening)
            self._resources = stack.pop_all()

    def join(self) -> tuple[Join, ...]:
        """Wait until every stage has a worker; what each worker said it has.

        Raises:
            LaunchError: a worker died, or did not join in time.
        """
        if not self._joins:
            joins = self._control.roster.wait_for_joins(JOIN_DEADLINE_S, self._check_joining)
            self._joins = tuple(joins[worker_id] for worker_id in self._launcher.worker_ids)
        return self._joins

    @property
    def default_kv_budget_tokens(self) -> int:
        """Of stages that state none themselves."""
        return self._settings.default_kv_budget_tokens

    @property
    def kv_budgets(self) -> tuple[int, ...]:
        """How many tokens each stage may cache."""
        default = self.default_kv_budget_tokens
        return tuple(stage.kv_budget_tokens or default for stage in self.plan.stages)

    @property
    def num_stages(self) -> int:
        """How many there are now."""
        return len(self.plan.stages)

    @property
    def epoch(self) -> int:
        """Of the latest assignment."""
        return self._settings.epoch

    def tell_model(self, model_dir: Path, fingerprint: str) -> None:
        """Where the model is and which it is, as far as that was not known when the workers were started."""
        self._settings = replace(self._settings, model_dir=model_dir, fingerprint=fingerprint)
        self._control.roster.model = self._model()

    def assign(self, default_kv_budget_tokens: int | None = None) -> None:
        """Let all workers begin to load, side by side; `load` waits for them.

        `default_kv_budget_tokens` replaces the settings' one. Raises LaunchError as `join`.
        """
        last = self.join()[-1]
        self.pipeline.last_public_key = last.public_key if self.pipeline.is_guarded else ""
        if default_kv_budget_tokens is not None:
            self._settings = replace(self._settings, default_kv_budget_tokens=default_kv_budget_tokens)
        ids = self._launcher.worker_ids
        told = self.plan, self._settings
        assignments = [
            assignment(index, *told, budget, self._joins, self.pipeline) for index, budget in enumerate(self.kv_budgets)
        ]
        requests = [self._control.begin(worker_id, each) for worker_id, each in zip(ids, assignments, strict=True)]
        self._loading.begin(requests, self.plan.stages, self.epoch)
        self.pipeline.most_kv_tokens = max(self.kv_budgets)

    def load(self) -> tuple[Ready, ...]:
        """Wait for the workers, give each its layers if that was not done, wait until all serve.

        Raises:
            LaunchError: a worker died, did not join in time, or cannot hold its layers. StageLost: one was lost at the
            end; StepStuck: nothing comes through from one to the next.
        """
        if not self._loading.has_begun:
            self.assign()
        self.ready = self._loading.wait(self._check_loading)
        self._loading.on_progress = None  # what is loaded again later, nobody watches
        first = self._joins[0]
        self.pipeline.connect(first.data_endpoint, first.public_key if first.is_guarded else None)
        if self._settings.hidden_size is not None:
            send_first_step(self.pipeline, self.epoch, self._settings.hidden_size, self._where)
        self._is_up, self._idle = True, IdleWatch()
        return self.ready

    def check(self) -> None:
        """Raises StageLost when a worker has died, left or fallen silent, ClosedError in the middle of closing."""
        if self.is_closing:
            raise ClosedError("the model was closed while it was asked")
        if not self._is_up:
            self.meanwhile()
        for dead in self._launcher.dead():
            raise StageLost(dead.describe("while serving"), by_sigkill=dead.by_sigkill)
        for worker_id, what in self._control.roster.lost().items():
            raise StageLost(f"{self._name(self._launcher.worker_ids.index(worker_id))} {what}")

    def _check_loading(self, waited_s: float) -> None:
        """As `check`, `waited_s` seconds after the last time; a worker that answers and does not load is lost, too."""
        roster, ids = self._control.roster, self._launcher.worker_ids
        by_stage = {index: pong for index, pong in enumerate(self._pongs()) if pong is not None}
        for index, what in self._loading.stuck(waited_s, by_stage).items():
            roster.give_up(ids[index], what)
        self.check()

    def awaited(self) -> str | None:
        """The workers of other hosts that are missing; None while all are there, or spares that can stand in."""
        return ", ".join(seat.text for seat in self._control.roster.missing(self._served)) or None

    def waits_for(self) -> str:
        """What stages that do not serve yet are waited for, in words."""
        roster, ids = self._control.roster, self._launcher.worker_ids
        if self._lost():
            return f"{', '.join(map(self._name, sorted(self._lost())))} to be replaced"
        if seats := roster.waiting_seats():
            return f"a worker for {', '.join(seat.text for seat in seats)}"
        if absent := [index for index, worker_id in enumerate(ids) if worker_id not in roster.joined()]:
            return f"{', '.join(map(self._name, absent))} to start"
        return self._loading.waits_for() or "both ends of the model, and a first step through all stages"

    def next_try(self, is_stuck: bool) -> str:
        """What `recover` is going to do about those that are lost, in words."""
        lost = self._lost() or ({self._place().suspect(self.num_stages)} if is_stuck else set())
        seats = {seat.worker_id for seat in self._control.roster.waiting_seats()}
        lost |= {index for index, worker_id in enumerate(self._launcher.worker_ids) if worker_id in seats}
        return next_try(self.plan, lost, self._patience_s)

    def recover(self, is_stuck: bool) -> int:
        """Replace the lost workers, and assign all stages in a new epoch, which is returned.

        The other workers keep their weights; all forget every sequence. `is_stuck` as for `replace_lost`.

        Raises:
            StageLost: another worker was lost meanwhile. LaunchError: one cannot load its layers. WorkerAbsent: another
            host's did not come back, and no spare will do.
        """
        self._is_up = False
        self._served |= dict(zip(self._launcher.worker_ids, self._joins, strict=False))
        self.replace_lost(is_stuck)
        self._await_others()
        self.plan = self._plan_as_seated()
        self.pipeline.hosts = tuple(stage.host for stage in self.plan.stages)
        self._settings = replace(self._settings, epoch=self._settings.epoch + 1)
        self.assign()
        self.runtime_dir.remove_sockets("worker-*", keep=[join.data_endpoint for join in self.join()])
        self.load()
        return self._settings.epoch

    def _await_others(self) -> None:
        """Whoever was awaited in vain is not awaited again: only a spare can help then. Raises WorkerAbsent."""
        try:
            self._control.roster.await_others(self._patience_s, self._served, self._check_joining)
        except WorkerAbsent:
            self._patience_s = 0.0
            raise
        self._patience_s = self._await_worker_s

    def replace_lost(self, is_stuck: bool) -> None:
        """Start workers anew in the place of those lost; `join` waits for them.

        `is_stuck`: a step does not come back, although all workers answer; then it is the one that the step seems to be
        at which is lost. Raises LaunchError.
        """
        for index in sorted(self._lost() or ({self._place().suspect(self.num_stages)} if is_stuck else ())):
            self._control.forget(self._launcher.worker_ids[index])
            if self.plan.stages[index].host is None:  # another host's worker comes back by itself, or another one does
                self._launcher.restart(index)
        self._joins = ()
        self._loading.could_not.clear()
        self._note_due_s = 0.0

    def leave_out_lost(self, choose: Callable[[Plan, Sequence[Remaining]], Replanned]) -> tuple[str, ...]:
        """Go on, after a `recover`, with the other stages alone, in the plan that is chosen for them; what went where.

        Raises:
            ReplanError: nobody is known to be lost, or the others cannot hold all layers; everything is as it was.
        """
        self.plan = self._plan_as_seated()
        roster, ids, guarded = self._control.roster, self._launcher.worker_ids, self._launcher.data_endpoints
        roster.await_own(JOIN_DEADLINE_S, self._dead_ids)
        joined, pongs = roster.joined(), roster.pongs()
        gone = self._lost() | self._loading.could_not
        gone |= {index for index, stage in enumerate(self.plan.stages) if stage.host and ids[index] not in joined}
        gone = gone or {index for index, worker_id in enumerate(ids) if worker_id not in joined}
        left = [index for index, worker_id in enumerate(ids) if index not in gone and worker_id in joined]
        if not gone:
            raise ReplanError("it is not known which stage is lost")
        chosen = choose(self.plan, [Remaining(index, joined[ids[index]], pongs.get(ids[index])) for index in left])
        listening = [number for number, index in enumerate(left) if index in guarded]
        self.pipeline.hosts = checked_hosts(
            chosen.plan, [*listening, *([len(left)] if self.pipeline.is_guarded else [])]
        )
        left_out = [worker_id for index, worker_id in enumerate(ids) if index not in left]
        roster.close_seats(left_out)
        for worker_id in left_out:
            self._control.forget(worker_id)
        self._launcher.keep_only(left, chosen.plan.stages)
        self.plan, self._joins = chosen.plan, ()
        self._settings = replace(self._settings, default_kv_budget_tokens=chosen.kv_tokens)
        return chosen.lines

    def _dead_ids(self) -> set[str]:
        self.meanwhile()
        return {self._launcher.worker_ids[dead.stage_index] for dead in self._launcher.dead()}

    def _lost(self) -> set[int]:
        lost = {self._launcher.worker_ids.index(worker_id) for worker_id in self._control.roster.lost()}
        return lost | {dead.stage_index for dead in self._launcher.dead()}

    def _name(self, index: int) -> str:
        """`stage 2 (cuda:0 of lab2, layers 13-24, pid 4711)`, for messages about it."""
        stage = self.plan.stages[index]
        pid = f", pid {self._joins[index].pid}" if self._joins else ""
        return f"stage {index + 1} ({stage.device} of {stage.host or 'this host'}, layers {stage.layers_text}{pid})"

    def suspect(self, what: str) -> str:
        """What was noticed of a stuck step, and where that seems to be."""
        place = self._place()
        if place.is_hop:
            return f"{what}; a step got lost {self._where()}"
        return f"{self._name(place.index)} seems to be stuck: {what}"

    def _where(self) -> str:
        names = [self._name(index) for index in range(self.num_stages)]
        ends = [*(join.data_endpoint for join in self._joins), self.pipeline.return_endpoint]
        objection = self.pipeline.objection
        but = "" if objection is None else f" (what came back was not taken: {objection})"
        return self._place().words(names, ends) + but

    def _place(self) -> Place:
        pongs = self._pongs()
        stages = [(pong.num_taken, pong.num_steps) if pong is not None else (0, 0) for pong in pongs]
        if self.pipeline.took_nothing:
            return Place(0, is_hop=stages[0][0] == stages[0][1])
        return locate(self.pipeline.num_sent, self.pipeline.num_back, stages)

    def _pongs(self) -> list[Pong | None]:
        pongs = self._control.roster.pongs()
        return [pongs.get(worker_id) for worker_id in self._launcher.worker_ids]

    def _look_for_steps(self) -> None:
        """Raises StepStuck when all stages are idle although steps are under way; not before the first step is back."""
        pongs = [pong for pong in self._pongs() if pong is not None]
        pipeline = self.pipeline
        if not self._is_up or len(pongs) < self.num_stages or pipeline.bytes_under_way > MOST_IDLE_BYTES:
            return
        if self._idle.look(pipeline.num_sent, pipeline.num_back, pongs):
            raise StepStuck(f"all stages have been idle for {IDLE_HEARTBEATS} heartbeats, while it was under way")

    def inspect(self, layer: int, sequence_id: int, what: InspectedPart) -> torch.Tensor:
        """What the stage that holds `layer` (from 0) has of a sequence, fp32 [num_tokens, ...].

        Raises:
            LaunchError: the stage has no such thing. StageLost: it does not answer.
        """
        index = next(i for i, stage in enumerate(self.plan.stages) if stage.layer_start <= layer < stage.layer_end)

        def ask(start_pos: int) -> Reply:
            inspect = Inspect(0, sequence_id, layer, what, start_pos)
            return self._control.request(self._launcher.worker_ids[index], inspect, REQUEST_DEADLINE_S)

        return inspected_whole(ask, f"stage {index + 1}")

    def health(self) -> tuple[Pong, ...]:
        """What each stage is doing and holding, asked now.

        Raises:
            StageLost: one does not answer.
        """
        pongs = []
        for number, worker_id in enumerate(self._launcher.worker_ids, start=1):
            reply = self._control.request(worker_id, Ping(0), REQUEST_DEADLINE_S)
            message, _ = expect(reply, Pong, f"stage {number}")
            assert isinstance(message, Pong)
            pongs.append(message)
        return tuple(pongs)

    def pause(self) -> None:
        """Stop the workers of this host where they are, until `resume`; for a launch that is suspended itself."""
        self._launcher.pause()

    def resume(self) -> None:
        """Let them go on."""
        self._launcher.resume()

    def close(self) -> None:
        """Stop and reap the workers, close the sockets, remove the runtime directory. Safe to call twice."""
        self._resources.close()

    def _bring_up(self, stack: ExitStack, on_log: LogSink | None, listening: Listening | None) -> None:
        raise_descriptor_limit()
        stages = self.plan.stages
        hosts = tuple(stage.host for stage in stages)
        self.context: zmq.Context[Socket] = stack.enter_context(zmq.Context())
        endpoint = self.runtime_dir.endpoint("control")
        guarded = {} if listening is None else guarded_endpoints(hosts, listening.endpoint)
        self._launcher = Launcher(stages, endpoint, on_log=on_log, data_endpoints=guarded)
        own = [worker_id for worker_id, host in zip(self._launcher.worker_ids, hosts, strict=True) if host is None]
        self._door = door = None if listening is None else self._open_door(listening)
        gatekeeper = None if door is None else stack.enter_context(door.gatekeeper(self.context, self._on_note))
        self._control = stack.enter_context(
            ControlPlane(
                self.context,
                endpoint,
                own,
                on_progress=self._relay_progress,
                door=self._door,
                gatekeeper=gatekeeper,
                on_note=self._on_note,
                model=self._model(),
            )
        )
        self.pipeline = Pipeline(
            self.context,
            guarded.get(len(stages), self.runtime_dir.endpoint("return")),
            self.check,
            gatekeeper=gatekeeper,
            is_guarded=len(stages) in guarded,
            hosts=hosts,
        )
        self.pipeline.look = self._look_for_steps
        stack.callback(self.pipeline.close)
        stack.enter_context(undone_at_signals(self._launcher.kill))
        stack.enter_context(undone_at_signals(self._launcher.ask_to_leave))
        stack.enter_context(self._launcher)

    def _open_door(self, listening: Listening) -> Door:
        token_dir = None if listening.shows_tokens else self.runtime_dir.path
        return Door(listening.endpoint, listening.keys, self._seats(), token_dir)

    def _model(self) -> HostModel:
        settings = self._settings
        return HostModel(settings.model_name or "demo model", settings.fingerprint, self.plan.num_layers)

    def _plan_as_seated(self) -> Plan:
        """The plan with those spares in it that have taken a stage."""
        seats = {seat.worker_id: seat for seat in (() if self._door is None else self._door.seats)}
        stages = list(self.plan.stages)
        for index, seat in enumerate(map(seats.get, self._launcher.worker_ids)):
            if seat is not None:
                stages[index] = replace(stages[index], host=seat.host, device=seat.device)
        return replace(self.plan, stages=tuple(stages))

    def _seats(self) -> list[Seat]:
        stages = zip(self._launcher.worker_ids, self.plan.stages, strict=True)
        return [Seat(worker_id, stage.host, stage.device) for worker_id, stage in stages if stage.host is not None]

    def _check_joining(self) -> None:
        """While workers join: whether one of this host has died; now and then, for which other hosts we wait."""
        self.meanwhile()
        self._launcher.check()
        waiting = self._control.roster.waiting_seats()
        if self._door is not None and waiting and time.monotonic() >= self._note_due_s:
            self._note_due_s = time.monotonic() + WAITING_NOTE_S
            for line in self._door.waiting_lines(waiting):
                self._on_note(line)

    def _relay_progress(self, worker_id: str, progress: Progress) -> None:
        self._loading.note(self._launcher.worker_ids.index(worker_id), progress)
