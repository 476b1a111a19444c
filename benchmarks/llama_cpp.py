"""Runs llama.cpp's own benchmark program on a model file, in one process or over its RPC servers."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

BENCH, SERVER = "llama-batched-bench", "ggml-rpc-server"
SERVER_DEADLINE_S = 30.0
RUN_DEADLINE_S = 600.0


class LlamaCppError(Exception):
    """A program is missing, ended early, or printed nothing that can be read."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second; of several sequences, all together."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A folder with llama.cpp's programs, a model, and the threads that they are to use."""

    folder: Path
    gguf: Path
    num_threads: int

    def __post_init__(self) -> None:
        for path in (self.gguf, self.folder / BENCH, self.folder / SERVER):
            if not path.is_file():
                raise LlamaCppError(f"{path} is not there")

    def speed(self, num_prompt: int, num_new: int, num_streams: int = 1, servers: Sequence[str] = ()) -> Speed:
        """Feed so many prompts, then decode all of them together; `servers` (HOST:PORT) have the layers, if any."""
        words = command(self.num_threads, self.gguf, num_prompt, num_new, num_streams, servers)
        try:
            done = subprocess.run(
                [str(self.folder / BENCH), *words], capture_output=True, text=True, timeout=RUN_DEADLINE_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise LlamaCppError(f"{BENCH} was not done after {RUN_DEADLINE_S:g} s") from None
        if done.returncode != 0:
            raise LlamaCppError(f"{BENCH} ended with {done.returncode}: {done.stderr[-500:]}")
        return parse_speed(done.stdout)

    @contextmanager
    def servers(self, count: int) -> Iterator[tuple[str, ...]]:
        """So many RPC servers on this host, each with the same number of threads, until the block is left."""
        with ExitStack() as stack:
            yield tuple([stack.enter_context(self._server()) for _ in range(count)])

    @contextmanager
    def _server(self) -> Iterator[str]:
        port = _free_port()
        words = [str(self.folder / SERVER), "-p", str(port), "-t", str(self.num_threads)]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()


def command(
    num_threads: int, gguf: Path, num_prompt: int, num_new: int, num_streams: int, servers: Sequence[str]
) -> list[str]:
    """The program's arguments."""
    context = max(512, num_streams * (num_prompt + num_new))
    words = f"-t {num_threads} -c {context} -npp {num_prompt} -ntg {num_new} -npl {num_streams} --output-format jsonl"
    placed = ["--rpc", ",".join(servers), "-ngl", "99"] if servers else []
    return ["-m", str(gguf), *words.split(), *placed]


def parse_speed(text: str) -> Speed:
    """The speeds in what the program printed. Raises LlamaCppError where there are none."""
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found = json.loads(line)
                return Speed(float(found["speed_pp"]), float(found["speed_tg"]))
            except (ValueError, KeyError):
                continue
    raise LlamaCppError(f"{BENCH} printed no speeds: {text[-500:]!r}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + SERVER_DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise LlamaCppError(f"{SERVER} does not listen on port {port}") from None
            time.sleep(0.1)
