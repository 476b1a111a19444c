"""Several hosts on one machine: network namespaces on a switch of their own, and processes inside them."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0
_numbers = itertools.count()


def why_not() -> str | None:
    """Why this machine has no network namespaces for us; None where it has."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` command (iproute2)"
    probe = f"glmprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"`ip netns add` fails: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Host:
    """A namespace with an address, a home directory of its own, and the processes that run there."""

    def __init__(self, namespace: str, address: str, directory: Path) -> None:
        self.namespace = namespace
        self.address = address
        self.directory = directory
        directory.mkdir()
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def environment(self) -> dict[str, str]:
        config, runtime = self.directory / "config", self.directory / "r"
        runtime.mkdir(mode=0o700, exist_ok=True)
        own = {"XDG_CONFIG_HOME": str(config), "XDG_RUNTIME_DIR": str(runtime), "GLMPIPE_CACHE": "off"}
        return {**os.environ, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, sys.executable, *words]

    def glmpipe(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            self.command("-P", "-m", "coordinator.cli", *words),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def start(self, *words: str) -> "Running":
        """`glmpipe ...`, until it is stopped."""
        log = self.directory / f"log-{next(_numbers)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command("-P", "-m", "coordinator.cli", *words),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return Running(process, log)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


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
    prefix = f"glm{os.getpid()}"
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
            made.append(Host(name, f"10.77.0.{number}", directory / f"h{number}"))
        yield made
    finally:
        for host in made:
            host.close()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
