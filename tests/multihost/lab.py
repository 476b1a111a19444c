"""A launch and its workers, each on a host of its own, and questions to them."""

import time
from collections.abc import Callable
from pathlib import Path

from coordinator.batch import Request
from coordinator.client import connect
from protocol.client import Finished, SamplingParams, TextPrompt
from tests.multihost.hosts import DEADLINE_S, Host, Running

NAMES = ("lab2", "lab3", "lab4")
LAYERS = ("1-2", "3-4", "5-6")
NUM_NEW = 300
"""Far more than there are after 20 of them when a fault, which takes some commands, has come about."""
QUESTION = ("--prompt", "What is 2 + 3?", "--greedy")


def write_plan(directory: Path) -> str:
    """A plan file: the demo model over three hosts."""
    path = directory / "plan.toml"
    stages = zip(NAMES, LAYERS, strict=True)
    path.write_text("".join(f'[[stage]]\ndevice = "cpu"\nhost = "{h}"\nlayers = "{n}"\n' for h, n in stages))
    return str(path)


def said(host: Host, *words: str) -> str:
    """What a command printed that was to succeed."""
    done = host.glmpipe(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def let_in(launching: Host, name: str, host: Host) -> None:
    """Put a host's new key on the list."""
    launching.keys.allowed.add(name, host.keys.make_own().public)


def worker_options(host: Host, launching: Host, port: int = 7500) -> tuple[str, ...]:
    """What `glmpipe worker` on that host needs, with the launching host's key."""
    key = launching.keys.own().public
    listen = f"tcp://{host.address}:{port}"
    return ("--join", f"tcp://{launching.address}:7410", "--key", key, "--listen", listen, "--threads", "1")


def start_worker(host: Host, launching: Host, *more: str) -> Running:
    """`glmpipe worker` on that host."""
    return host.start("worker", *worker_options(host, launching), *more)


def start_changed_worker(host: Host, launching: Host, change: str, port: int) -> Running:
    """The same in a Python that runs this statement first."""
    command = changed("stage_worker.cli", change)
    return host.start_program(host.command(*command, *worker_options(host, launching, port)))


def changed(program: str, change: str) -> tuple[str, ...]:
    """What Python is to run: this statement, and then the program."""
    return "-P", "-c", f"import sys; from {program} import main; {change}; sys.exit(main())"


def start_launch(host: Host, plan: str, *more: str, change: str = "pass") -> Running:
    """`glmpipe launch` on that host, in a Python that runs a statement first."""
    command = changed("coordinator.__main__", change)
    return host.start_program(host.command(*command, "launch", plan, "--listen", f"tcp://{host.address}", *more))


class Lab:
    """A launch that serves, with a worker on each of the hosts that the plan names."""

    def __init__(self, hosts: list[Host], plan: str, *more: str, change: str = "pass") -> None:
        self.launching, *self.hosts = hosts
        self._wanted: dict[tuple[int, int | None], list[tuple[int, ...]]] = {}
        self.launching.keys.make_own()
        for name, host in zip(NAMES, self.hosts, strict=False):
            let_in(self.launching, name, host)
        self.launch = start_launch(self.launching, plan, "--no-prefix-reuse", *more, change=change)
        self.workers = [start_worker(host, self.launching) for _, host in zip(NAMES, self.hosts, strict=False)]
        self.launch.wait_for("serving at")

    @property
    def endpoint(self) -> str:
        """Where clients connect; files are not of a network namespace."""
        return self.launch.log.partition("serving at ")[2].split()[0]

    def wanted(self, num_answers: int, seed: int | None) -> list[tuple[int, ...]]:
        """What comes when nothing happens."""
        if (num_answers, seed) not in self._wanted:
            self._wanted[num_answers, seed] = self.answers(num_answers, seed)
        return self._wanted[num_answers, seed]

    def answers(
        self, num_answers: int, seed: int | None, fault: Callable[[], None] | None = None, after: int = 20
    ) -> list[tuple[int, ...]]:
        """Answers of NUM_NEW tokens to the same questions as ever; the fault comes after so many tokens of all of them.

        Each stage is seen to hold those of the last answer alone when it ends, and so to have forgotten all others.
        """
        sampling = SamplingParams(1.0, 0, 1.0, 0.0, 1.0, seed, (), NUM_NEW, True, seed is None)
        finished: dict[int, Finished] = {}
        num_tokens = 0
        give_up_at_s = time.monotonic() + DEADLINE_S
        with connect(self.endpoint) as launch:
            prompts = [TextPrompt(f"What is {number} + 3? ") for number in range(num_answers)]
            tickets = [launch.submit(Request(prompt, sampling))[0] for prompt in prompts]
            while len(finished) < num_answers:
                assert time.monotonic() < give_up_at_s, f"no answer came:\n{self.launch.log}"
                progress = launch.poll()
                num_tokens += progress.num_new_tokens
                for ended in progress.ended:
                    assert ended.finished is not None, ended.error
                    finished[ended.ticket] = ended.finished
                if fault is not None and num_tokens >= after:
                    assert not finished, "the fault came too late"
                    fault()
                    fault = None
        if num_answers == 1:
            stats = finished[tickets[0]].stats
            most = stats.prompt_tokens + stats.new_tokens
            assert all(stage.kv_tokens <= most for stage in stats.stages), stats
        return [finished[ticket].token_ids for ticket in tickets]

    def wait_for_connections(self, *wanted_ones: int) -> None:
        """Until each host has so many connections: by default each worker's control, the way through the stages."""
        wanted = list(wanted_ones) or [2 + len(self.workers), *[3] * len(self.workers)]
        give_up_at_s = time.monotonic() + DEADLINE_S
        hosts = [self.launching, *self.hosts[: len(self.workers)]]
        while (found := [host.num_connections() for host in hosts]) != wanted:
            assert time.monotonic() < give_up_at_s, f"connections: {found}, not {wanted}"
            time.sleep(0.2)
