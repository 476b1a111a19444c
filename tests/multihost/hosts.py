"""Several hosts on one machine: network namespaces on a switch of their own, and processes inside them."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from protocol.key_files import KeyDirectory

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
_numbers = itertools.count()


def why_not(*commands: str) -> str | None:
    """Why this machine has no network namespaces for us, or lacks a command; None where it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for command in ("ip", *commands):
        if shutil.which(command) is None:
            return f"there is no `{command}` command (iproute2)"
    probe = f"glmprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"`ip netns add` fails: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Host:
    """A namespace with an address, a home directory of its own, and the processes that run there."""

    def __init__(self, namespace: str, address: str, directory: Path, plug: tuple[str, str] = ("", "")) -> None:
        self.namespace = namespace
        self.address = address
        self.plug = plug
        """The namespace of the switch, and the port there that this host's cable ends in."""
        self.directory = directory
        directory.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        config, runtime = self.directory / "config", self.directory / "r"
        runtime.mkdir(mode=0o700, exist_ok=True)
        own = {"XDG_CONFIG_HOME": str(config), "XDG_RUNTIME_DIR": str(runtime), "GLMPIPE_CACHE": "off"}
        return {**os.environ, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    @property
    def keys(self) -> KeyDirectory:
        """Where `glmpipe` has them on this host."""
        return KeyDirectory(self.directory / "config" / "glmpipe" / "keys")

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, sys.executable, *words]

    def glmpipe(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            self.command("-P", "-m", "coordinator", *words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def start(self, *words: str) -> "Running":
        """`glmpipe ...`, until it is stopped."""
        return self.start_program(self.command("-P", "-m", "coordinator", *words))

    def start_program(self, command: list[str]) -> "Running":
        """Any command, until it is stopped."""
        log = self.directory / f"log-{next(_numbers)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return Running(process, log)

    def pids(self) -> list[int]:
        """All processes that run here."""
        return list(map(int, _ip("netns", "pids", self.namespace).split()))

    def num_connections(self) -> int:
        """How many TCP connections this host believes to have."""
        listed = subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ss", "-Htn", "state", "established"],
            capture_output=True,
            text=True,
            check=True,
        )
        return len(listed.stdout.splitlines())

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Its cable is out of the switch."""
        switch, port = self.plug
        _ip("-n", switch, "link", "set", port, "down")
        try:
            yield
        finally:
            _ip("-n", switch, "link", "set", port, "up")

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """What is sent to it is lost, what it sends arrives."""
        with _dropping(*self.plug):
            yield

    @contextmanager
    def mute(self) -> Iterator[None]:
        """What it sends is lost, what is sent to it arrives."""
        with _dropping(self.namespace, "eth0"):
            yield

    @contextmanager
    def cut_off_from(self, other: "Host") -> Iterator[None]:
        """What it sends to that one host is lost, whatever else it sends or hears is not."""
        route = ("-n", self.namespace, "route")
        _ip(*route, "add", "blackhole", f"{other.address}/32")
        try:
            yield
        finally:
            _ip(*route, "del", "blackhole", f"{other.address}/32")

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """All of its processes stand still; its kernel answers."""
        pids = self.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill what runs here, whoever started it."""
        for process in self._processes:
            process.kill()
            process.wait()
        give_up_at_s = time.monotonic() + DEADLINE_S
        while (left := self.pids()) and time.monotonic() < give_up_at_s:  # a killed launch's own workers leave
            time.sleep(0.05)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"{len(left)} processes were left on {self.namespace}"


class Running:
    """A process and what it has printed."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, words: str, count: int = 1) -> None:
        """Until it has printed `words` so many times."""
        give_up_at_s = time.monotonic() + DEADLINE_S
        while self.log.count(words) < count:
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {words!r}:\n{self.log}"
            assert time.monotonic() < give_up_at_s, f"{words!r} did not come:\n{self.log}"
            time.sleep(0.05)


@contextmanager
def hosts(directory: Path, num_hosts: int) -> Iterator[list[Host]]:
    """Namespaces 10.77.0.1, 10.77.0.2, ... that reach each other and nothing else."""
    prefix = f"glm{os.getpid()}n{next(_numbers)}"
    switch = f"{prefix}s"
    made: list[Host] = []
    namespaces: list[str] = []
    try:
        _ip("netns", "add", switch)
        namespaces.append(switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for number in range(1, num_hosts + 1):
            name, cable = f"{prefix}h{number}", f"p{number}"
            _ip("netns", "add", name)
            namespaces.append(name)
            _ip("-n", switch, "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", cable, "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            made.append(Host(name, f"10.77.0.{number}", directory / f"h{number}", (switch, cable)))
        yield made
    finally:
        with ExitStack() as stack:
            for namespace in namespaces:
                stack.callback(subprocess.run, ["ip", "netns", "del", namespace], check=False)
            for host in made:
                stack.callback(host.close)


@contextmanager
def _dropping(namespace: str, device: str) -> Iterator[None]:
    """All that would leave by this device is dropped: a queue with no place in it."""
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "pfifo", "limit", "0")
    try:
        yield
    finally:
        _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
