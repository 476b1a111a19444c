"""Hours in minutes: requests of all kinds, cancels, clients that vanish, a stage killed every minute; what is left?

    python -m benchmarks.soak [--minutes 30] [--stages 3] [--clients 4] [--seed 0] [--json FILE]

A launch of the demo model serves several clients, each a program of its own over the client socket: short and long
requests, greedy and seeded, some cancelled in the middle, some by a client that goes without a word. Once a minute a
worker is killed (SIGKILL) or stopped (SIGSTOP). Every answer that was not cancelled must be, token for token, what the
same request gives when nothing happens; of one cancelled, what came must be its beginning. At the end: lost or wrong
answers, faults and how long recovery took, the longest pause a reader saw, the memory of every process in the first
and the last third, and whatever was left behind. Exit code 1 if anything of that is not as it should be.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import coordinator
from coordinator.chat_model import ChatModel
from coordinator.client import connect
from coordinator.errors import CoordinatorError
from coordinator.plan_request import PlanRequest
from coordinator.recovery import RecoveryPolicy
from coordinator.service import serve
from protocol.client import Delta, Finished, SamplingParams, TextPrompt

TOPICS = ("你好", "What is a pipeline?", "写一首关于山的短诗", "Count from one to twenty.", "How are you today?")
FAULT_EVERY_S = 60.0
GROWTH_ALLOWED = 1.10
MB = 1e6


@dataclass(frozen=True, slots=True)
class Wish:
    """A request of the soak; those of equal fields have equal answers."""

    text: str
    num_new: int
    seed: int | None

    @property
    def sampling(self) -> SamplingParams:
        """As the client sends it: never ended by the model, so that lengths are mixed as asked for."""
        greedy = self.seed is None
        return SamplingParams(1.0, 0, 1.0, 0.0, 1.0, self.seed, (), self.num_new, ignore_eos=True, greedy=greedy)


@dataclass(slots=True)
class Tally:
    """What happened, guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    finished: int = 0
    cancelled: int = 0
    vanished: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)


def wishes(choice: random.Random) -> Wish:
    """Mostly short, sometimes a long prompt, sometimes a long answer; few enough different ones to know all answers."""
    topic = choice.choice(TOPICS)
    text = topic * choice.choice((1, 1, 1, 12))
    return Wish(text, choice.choice((8, 8, 24, 80)), choice.choice((None, None, 1, 2)))


def right_answers(chat_model: ChatModel) -> dict[Wish, tuple[int, ...]]:
    """Every wish's tokens, asked one by one before anything happens."""
    found = {}
    for topic in TOPICS:
        for times in (1, 12):
            for seed in (None, 1, 2):
                longest = Wish(topic * times, 80, seed)
                *_, last = chat_model.stream(TextPrompt(longest.text), longest.sampling)
                assert isinstance(last, Finished)
                for num_new in (8, 24, 80):
                    found[Wish(longest.text, num_new, seed)] = last.token_ids[:num_new]
    return found


def converse(endpoint: str, right: dict[Wish, tuple[int, ...]], until_s: float, seed: int, tally: Tally) -> None:
    """One client after the other, asking until the time is over."""
    choice = random.Random(seed)
    while not Path(endpoint.removeprefix("ipc://")).exists():
        time.sleep(0.05)
    while time.monotonic() < until_s:
        try:
            with connect(endpoint, deadline_s=60) as backend:
                for _ in range(choice.randint(1, 20)):
                    if time.monotonic() > until_s or not ask(backend, wishes(choice), choice.random(), right, tally):
                        break
        except CoordinatorError as error:
            with tally.lock:
                tally.failed.append(str(error)[:200])


def ask(backend, wish: Wish, fate: float, right: dict[Wish, tuple[int, ...]], tally: Tally) -> bool:  # type: ignore[no-untyped-def]
    """One request; false when its client vanishes in the middle."""
    ids: list[int] = []
    heard_s, pause_s, stops_at = time.monotonic(), 0.0, wish.num_new // 2
    whole = False
    for event in backend.stream(TextPrompt(wish.text), wish.sampling):
        pause_s, heard_s = max(pause_s, time.monotonic() - heard_s), time.monotonic()
        if isinstance(event, Delta):
            ids += event.token_ids
        elif isinstance(event, Finished):
            whole = event.finish_reason == "length"
        if len(ids) >= stops_at and fate < 0.05:
            with tally.lock:
                tally.vanished += 1
            return False
        if len(ids) >= stops_at and fate < 0.15:
            backend.cancel()
    wanted = right[wish]
    with tally.lock:
        tally.pauses_s.append(pause_s)
        tally.finished += whole
        tally.cancelled += not whole
        if tuple(ids) != (wanted if whole else wanted[: len(ids)]):
            tally.wrong.append(f"{wish}: {ids[:10]}... for {wanted[:10]}...")
    return True


def strike(chat_model: ChatModel, until_s: float, seed: int, tally: Tally) -> None:
    """A fault a minute, told by what the supervisor says of it."""
    choice = random.Random(seed)
    struck_s = 0.0

    def told(text: str) -> None:
        if "serve again" in text:
            with tally.lock:
                tally.recoveries_s.append(time.monotonic() - struck_s)

    chat_model.supervisor.mender.on_event = told
    while time.monotonic() + FAULT_EVERY_S < until_s:
        time.sleep(FAULT_EVERY_S)
        stage = choice.randrange(len(chat_model.cluster.plan.stages))
        number = choice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
        struck_s = time.monotonic()
        os.kill(chat_model.cluster.join()[stage].pid, number)
        with tally.lock:
            tally.faults.append(f"{number.name} of stage {stage + 1}")


def watch_memory(chat_model: ChatModel, until_s: float, tally: Tally) -> None:
    """The private memory of the coordinator and of each stage's present worker, every two seconds."""
    while time.monotonic() < until_s:
        pids = {"coordinator": os.getpid()}
        pids |= {f"stage {number}": join.pid for number, join in enumerate(chat_model.cluster.join(), start=1)}
        for name, pid in pids.items():
            size = private_bytes(pid)
            if size:
                tally.memory.setdefault(name, []).append((time.monotonic(), size))
        time.sleep(2)


def private_bytes(pid: int) -> int:
    """Anonymous resident memory; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


@contextmanager
def threads(*targets: threading.Thread) -> Iterator[None]:
    """Run beside the block, and end before it is left."""
    for target in targets:
        target.start()
    yield
    for target in targets:
        target.join()


def soak(options: argparse.Namespace) -> Tally:
    tally = Tally()
    plan = PlanRequest(num_stages=options.stages, num_threads=1, prefill_chunk=32)
    with coordinator.launch(None, plan, on_log=lambda _: None, recovery=RecoveryPolicy(settled_s=5.0)) as chat_model:
        right = right_answers(chat_model)
        until_s = time.monotonic() + 60 * options.minutes
        endpoint = chat_model.cluster.runtime_dir.endpoint("clients")
        run = threading.Thread
        clients = [
            run(target=converse, args=(endpoint, right, until_s, 100 * options.seed + number, tally))
            for number in range(options.clients)
        ]
        others = [
            run(target=strike, args=(chat_model, until_s, options.seed, tally)),
            run(target=watch_memory, args=(chat_model, until_s, tally)),
        ]
        with threads(*others, *clients):
            serve(chat_model, endpoint, lambda: not any(thread.is_alive() for thread in (*others, *clients)))
        pids = [join.pid for join in chat_model.cluster.join()]
        directory = Path(endpoint.removeprefix("ipc://")).parent
    tally.failed += [f"process {pid} is left" for pid in pids if private_bytes(pid)]
    tally.failed += [f"{directory} is left"] if directory.exists() else []
    return tally


def growth(samples: list[tuple[float, int]]) -> tuple[float, float, float]:
    """Mean bytes in the first and the last third, and the ratio."""
    sizes = [size for _, size in samples]
    third = max(1, len(sizes) // 3)
    first, last = statistics.mean(sizes[:third]), statistics.mean(sizes[-third:])
    return first, last, last / first


def report(tally: Tally, minutes: float) -> bool:
    """Print the tables; whether all is as it should be."""
    good = not tally.wrong and not tally.failed
    counts = f"{tally.finished} answers whole, {tally.cancelled} cancelled, {tally.vanished} clients vanished"
    print(f"\n{minutes:g} minutes: {counts}")
    print(f"wrong: {len(tally.wrong)}; failed or left behind: {len(tally.failed)}")
    for line in (*tally.wrong[:10], *tally.failed[:10]):
        print(f"  {line}")
    print("\n| faults | recovered | median s | p99 s | longest pause of a reader, s |\n| --- | --- | --- | --- | --- |")
    times = sorted(tally.recoveries_s) or [0.0]
    p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
    pause_s = max(tally.pauses_s, default=0.0)
    seconds = " | ".join(f"{value:.2f}" for value in (statistics.median(times), p99, pause_s))
    print(f"| {len(tally.faults)} | {len(tally.recoveries_s)} | {seconds} |")
    print("\n| process | first third, MB | last third, MB | ratio |\n| --- | --- | --- | --- |")
    for name, samples in sorted(tally.memory.items()):
        first, last, ratio = growth(samples)
        good &= ratio <= GROWTH_ALLOWED
        print(f"| {name} | {first / MB:.1f} | {last / MB:.1f} | {ratio:.3f} |")
    return good and len(tally.recoveries_s) == len(tally.faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write what happened")
    options = parser.parse_args()
    tally = soak(options)
    good = report(tally, options.minutes)
    if options.json:
        found = {key: value for key, value in ((f, getattr(tally, f)) for f in Tally.__slots__) if key != "lock"}
        Path(options.json).write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
