"""Starts one worker process per stage, relays what they print, notices their death and never leaves one behind.

Every worker inherits the read end of one pipe, the lifeline. Only the launcher holds the write end, so the pipe
reaches end-of-file the moment the launcher is gone, however it died, and the workers leave by themselves. Workers
have process groups of their own: a terminal's Ctrl-C reaches the launcher alone, which then stops them in order.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Self

from coordinator.closing import Closing
from coordinator.errors import LaunchError, StageLost, WorkerDied
from coordinator.log import WorkerLine, to_stderr
from coordinator.plan import StagePlan
from coordinator.signals import signals_deferred
from coordinator.worker_command import usable_cores, worker_command, worker_environment
from protocol.descriptors import PASSING, descriptor_limit

LogSink = Callable[[str], None]
"""Takes one line of a worker's output, a `WorkerLine`. Called from the launcher's reader threads."""

NUM_LAST_LINES = 12
_MAX_LINE_BYTES = 32 * 1024
_SIGNAL_REMEDIES: Mapping[int, str] = {
    signal.SIGKILL: "the system has probably run out of memory: give this stage fewer layers or a lower precision",
    signal.SIGILL: "this CPU lacks an instruction that the installed torch needs: install another build of torch",
}


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """A worker that has ended. `returncode` is negative for a signal, as in `subprocess`."""

    stage_index: int
    device: str
    pid: int
    returncode: int
    last_lines: tuple[str, ...]

    @property
    def reason(self) -> str:
        """`exit code 3` or `signal SIGKILL`."""
        if self.returncode >= 0:
            return f"exit code {self.returncode}"
        return f"signal {_signal_name(-self.returncode)}"

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, one that another process need not get."""
        return self.returncode < 0 and -self.returncode != signal.SIGILL

    @property
    def by_sigkill(self) -> bool:
        """Whether it ended as a system ends processes when memory runs out."""
        return -self.returncode == signal.SIGKILL

    def describe(self, when: str) -> str:
        """For an error's message; `when` is such as `before it joined`. Carries the worker's last lines."""
        remedy = _SIGNAL_REMEDIES.get(-self.returncode)
        name = f"stage {self.stage_index + 1} ({self.device} of this host, pid {self.pid})"
        text = f"{name} ended with {self.reason} {when}"
        text += f"; {remedy}" if remedy else ""
        if not self.last_lines:
            return f"{text}; it printed nothing"
        return f"{text}; its last lines:" + "".join(f"\n  | {line}" for line in self.last_lines)


class Launcher(Closing):
    """One worker process per stage of a plan. A context manager: `start` on the way in, `close` on the way out.

    `endpoint` is the coordinator's control endpoint. `on_log` receives the workers' prefixed lines, stderr by
    default. `command` is what starts a worker; the worker's options are appended. Stages of other hosts are not its
    business. `data_endpoints` says, by stage, where those listen that follow another host's stage.
    """

    def __init__(
        self,
        stages: Sequence[StagePlan],
        endpoint: str,
        *,
        on_log: LogSink | None = None,
        command: Sequence[str] | None = None,
        data_endpoints: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.data_endpoints = data_endpoints
        self._stages = tuple(stages)
        self.worker_ids = tuple(f"stage-{number}" for number in range(1, len(stages) + 1))
        """The `worker_id` each stage's worker joins with, in stage order; it keeps it when the stages change."""
        self._endpoint = endpoint
        self._on_log = on_log or to_stderr
        self._command = tuple(command) if command is not None else worker_command()
        self._workers: list[_Worker] = []
        self._lifeline: tuple[int, int] | None = None
        """Read and write end; the read end is kept for workers that are started later."""

    def start(self) -> None:
        """Spawn all workers. Raises LaunchError, with none left running, when one cannot be spawned."""
        if self._lifeline is not None or self._workers:
            raise LaunchError("these workers were started already; a launcher starts its workers once")
        self._lifeline = os.pipe()
        try:
            with signals_deferred():
                for index in (i for i, stage in enumerate(self._stages) if stage.host is None):
                    self._workers.append(self._spawn(index, self._lifeline[0]))
        except OSError as error:
            self.close()
            raise LaunchError(f"{self._command[0]} cannot be started: {error.strerror}") from None
        except BaseException:
            self.close()
            raise

    def restart(self, index: int) -> None:
        """Put another process in the place of a stage's worker, which is killed if it still lives.

        Raises:
            LaunchError: it cannot be spawned. StageLost: not just now, for want of descriptors or memory.
        """
        assert self._lifeline is not None
        place = next(i for i, worker in enumerate(self._workers) if worker.stage_index == index)
        self._workers[place].kill()
        try:
            with signals_deferred():
                self._workers[place] = self._spawn(index, self._lifeline[0])
        except OSError as error:
            if error.errno in PASSING:
                raise StageLost(
                    f"stage {index + 1} ({self._stages[index].device} of this host) is gone, and its worker cannot be "
                    f"started just now: {error.strerror} ({descriptor_limit()} descriptors are allowed)"
                ) from None
            raise LaunchError(f"{self._command[0]} cannot be started: {error.strerror}") from None

    def keep_only(self, left: Sequence[int], stages: Sequence[StagePlan]) -> None:
        """End all workers but those of the stages with these indices, which are `stages` from now on, in that order."""
        for worker in [worker for worker in self._workers if worker.stage_index not in left]:
            worker.kill()
            self._workers.remove(worker)
        for worker in self._workers:
            worker.stage_index = left.index(worker.stage_index)
        self.worker_ids = tuple(self.worker_ids[index] for index in left)
        here = self.data_endpoints
        self.data_endpoints = {number: here[index] for number, index in enumerate(left) if index in here}
        self._stages = tuple(stages)

    def dead(self) -> list[WorkerExit]:
        """The workers that have died, the first one first."""
        dead = [worker for worker in self._workers if worker.has_ended()]
        return [worker.exit() for worker in sorted(dead, key=lambda worker: worker.ended_at_s)]

    def check(self) -> None:
        """For the time before all workers joined: raises WorkerDied with its last lines if one has died."""
        for dead in self.dead():
            raise WorkerDied(dead.describe("before it joined"), was_killed=dead.was_killed)

    def pause(self) -> None:
        """Stop all workers where they are, until `resume`: they take no processor, and miss nobody.

        Should this process die meanwhile, the system lets them go on (their groups are orphaned then), and they leave.
        """
        self._tell_groups(signal.SIGSTOP)

    def resume(self) -> None:
        """Let workers that `pause` stopped go on."""
        self._tell_groups(signal.SIGCONT)

    def _tell_groups(self, number: signal.Signals) -> None:
        for worker in self._workers:
            if not worker.has_ended():
                worker.signal_group(number)

    def close(self, grace_s: float = 2.0) -> None:
        """Ask all workers to leave, kill those that have not after `grace_s`, and reap every one.

        Safe to call at any time, from `finally` clauses and twice. Interrupted (Ctrl-C again), it kills at once.
        """
        lifeline, self._lifeline = self._lifeline, None
        try:
            self.ask_to_leave(grace_s)
        finally:
            for end in lifeline or ():
                os.close(end)
            self.kill()
            self._workers.clear()

    def ask_to_leave(self, grace_s: float = 2.0) -> None:
        """Ask all workers, and wait so long for them."""
        for worker in self._workers:
            worker.signal(signal.SIGTERM)
        deadline_s = time.monotonic() + grace_s
        for worker in self._workers:
            worker.wait(max(0.0, deadline_s - time.monotonic()))

    def kill(self) -> None:
        """Kill the workers that have not left, and reap every one."""
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def _spawn(self, index: int, lifeline: int) -> "_Worker":
        stage = self._stages[index]
        num_threads = usable_cores() if stage.num_threads is None else stage.num_threads
        options = {
            "--join": self._endpoint,
            "--device": stage.device,
            "--threads": num_threads,
            "--worker-id": self.worker_ids[index],
            "--lifeline-fd": lifeline,
        }
        if index in self.data_endpoints:
            options["--listen"] = self.data_endpoints[index]
        command = [*self._command, "--log-json", *(str(part) for option in options.items() for part in option)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=worker_environment(),
            pass_fds=(lifeline,),
            process_group=0,
        )
        return _Worker(index, stage.device, process, self._on_log)


class _Worker:
    """One worker process and the thread that reads what it prints."""

    def __init__(self, index: int, device: str, process: "subprocess.Popen[bytes]", on_log: LogSink) -> None:
        self.stage_index = index
        self._device = device
        self._process = process
        self._on_log = on_log
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self.ended_at_s = float("inf")
        self._reader = threading.Thread(target=self._read, name=f"log of stage {index + 1}", daemon=True)
        self._reader.start()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def exit(self) -> WorkerExit:
        self._reader.join(timeout=1.0)
        return WorkerExit(
            self.stage_index, self._device, self._process.pid, self._process.returncode, tuple(self._last_lines)
        )

    def signal_group(self, number: signal.Signals) -> None:
        """To the process and its children; not after it was reaped, when its pid may be somebody else's."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)

    def kill(self) -> None:
        """End the process with all its children, reap it and finish reading."""
        if self._process.poll() is None:  # once reaped, its pid may be somebody else's
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(timeout=1.0)

    def _read(self) -> None:
        pipe: IO[bytes] | None = self._process.stdout
        assert pipe is not None
        with pipe:
            while line := pipe.readline(_MAX_LINE_BYTES):
                said = WorkerLine(self.stage_index + 1, self._device, line.decode("utf-8", errors="replace").rstrip())
                self._last_lines.append(said.text)
                # A sink that fails must not stop the reading: the worker would block on a full pipe.
                with contextlib.suppress(Exception):
                    self._on_log(said)
        self.ended_at_s = time.monotonic()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
