"""What a hop of a hidden state costs through a stage worker, beside a process that forwards frames and knows nothing.

    python -m benchmarks.hop [--laps 200] [--rounds 9] [--json FILE]

Real workers are launched, joined, assigned and watched as always, but for layers: their stages have none. One token's
hidden state of the 6B shape (4096 values in bf16, 8 KiB) goes round: coordinator, workers, coordinator, over ipc. So
it does through as many processes that receive the frames with pyzmq and send them on. A hop's cost is half of what
two more processes in the chain add to a lap: both ends' share of a lap cancels. All four chains take turns, `--laps`
laps each.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest.mock import patch

import torch
import zmq

from benchmarks.figures import Figure, in_turns, options_parser, over, publish, say
from coordinator.chain import FIRST_EPOCH
from coordinator.cluster import Cluster
from coordinator.cluster_settings import ClusterSettings
from coordinator.pipeline import Outcome, Pipeline
from coordinator.plan_request import Option, PlanRequest
from coordinator.planning import plan_for
from coordinator.runtime_dir import RuntimeDir
from glm.attention import Segment
from glm.config import load_config
from glm.model import LayerObserver, LayerStack
from glm.precision import Precision
from glm.weights import place
from protocol.control import Assign
from protocol.data import Span, Step
from protocol.sockets import Socket, bind, connect, data_socket
from stage_worker.stage import Stage

MODEL = Path("random:chatglm2-6b")
SHORT, LONG = 1, 3
"""Processes in the two chains of either kind."""
UNTIMED_LAPS = 20
WORKER_WORD = "worker"
MOST_HOP_US = 150.0


class NoLayers(LayerStack):
    """A stack that gives back what it gets, and counts it as cached."""

    @property
    def kernel_path(self) -> str:
        return "none"

    def forward(
        self,
        hidden: torch.Tensor,
        segments: Sequence[Segment],
        observer: LayerObserver | None = None,  # noqa: ARG002 - as the base has it
        before_layer: Callable[[], None] | None = None,  # noqa: ARG002
    ) -> torch.Tensor:
        for segment in segments:
            segment.cache.commit(segment.num_tokens)
        return hidden


def empty_stage(assign: Assign, device: torch.device, *_: object) -> Stage:
    """In place of `load_stage`."""
    config = load_config(Path(assign.model_path))
    layers = NoLayers([], config, assign.layer_start, place(Precision.parse(assign.precision), device, config))
    return Stage(layers, assign.kv_budget_tokens)


def forward_frames(come: str, go: str) -> None:
    """A process of the bare chain: until it is killed."""
    context: zmq.Context[Socket] = zmq.Context()
    pull, push = data_socket(context, zmq.PULL), data_socket(context, zmq.PUSH)
    bind(pull, come)
    connect(push, go)
    while True:
        push.send_multipart(pull.recv_multipart(copy=False), copy=False)


@contextmanager
def workers(length: int) -> Iterator[Pipeline]:
    """Both ends of a chain of stage workers without layers."""
    plan = plan_for(PlanRequest(num_stages=length, num_threads=1, cpu_precision=Option("", "bf16")), num_layers=28)
    command = (sys.executable, "-P", "-m", "benchmarks.hop", WORKER_WORD)
    settings = ClusterSettings(MODEL, "", FIRST_EPOCH, default_kv_budget_tokens=64)
    with patch("coordinator.launcher.worker_command", lambda: command), Cluster(plan, settings) as cluster:
        cluster.load()
        yield cluster.pipeline


@contextmanager
def forwarders(length: int) -> Iterator[Pipeline]:
    """The same two ends of a chain of bare forwarders."""
    with ExitStack() as stack:
        directory = stack.enter_context(RuntimeDir())
        names = [directory.endpoint(f"forwarder-{number}") for number in range(length)]
        pipeline = Pipeline(stack.enter_context(zmq.Context()), directory.endpoint("return"), lambda: None, hosts=())
        stack.callback(pipeline.close)
        following = [*names[1:], pipeline.return_endpoint]
        for come, go in zip(names, following, strict=True):
            stack.enter_context(_process(come, go))
        pipeline.connect(names[0])
        yield pipeline


@contextmanager
def _process(come: str, go: str) -> Iterator[BaseProcess]:
    process = multiprocessing.get_context("spawn").Process(target=forward_frames, args=(come, go), daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


class Chain:
    """Laps of one hidden state, and what the workers say of the last ones."""

    def __init__(self, pipeline: Pipeline, hidden: torch.Tensor) -> None:
        self._pipeline = pipeline
        self._hidden = hidden
        self._num_laps = 0
        self.outcomes: list[Outcome] = []

    def laps(self, count: int) -> float:
        """Median seconds of a lap."""
        self.outcomes = [self._lap() for _ in range(UNTIMED_LAPS + count)][UNTIMED_LAPS:]
        return statistics.median(outcome.arrived_at_s - outcome.submitted_at_s for outcome in self.outcomes)

    def _lap(self) -> Outcome:
        self._num_laps += 1
        step = Step(FIRST_EPOCH, self._num_laps, (), (Span(1, 0, 1, None, None),), ())
        self._pipeline.submit(step, self._hidden)
        return self._pipeline.collect(FIRST_EPOCH)

    def inside_s(self) -> float:
        """Median seconds from a step's arrival at a worker until it was about to send it on."""
        timings = [timing for outcome in self.outcomes for timing in outcome.message.timings]
        return statistics.median(timing.sent_at_s - timing.received_at_s for timing in timings)


def figures(lap_s: dict[str, list[float]], inside_s: list[float]) -> list[Figure]:
    """From the laps of all rounds, by kind and length."""
    hops = {
        kind: [(b - a) / (LONG - SHORT) for a, b in zip(lap_s[f"{kind} {SHORT}"], lap_s[f"{kind} {LONG}"], strict=True)]
        for kind in ("worker", "bare")
    }
    in_us = {kind: tuple(1e6 * value for value in values) for kind, values in hops.items()}
    return [
        Figure("a hop through a worker", "us", in_us["worker"], most=MOST_HOP_US),
        Figure("of it, inside the worker", "us", tuple(1e6 * value for value in inside_s)),
        Figure("a hop through a bare forwarder", "us", in_us["bare"]),
        over("worker over bare", hops["worker"], hops["bare"]),
    ]


def main() -> None:
    parser = options_parser(__doc__, rounds=9)
    parser.add_argument("--laps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hidden = torch.randn(1, load_config(MODEL).hidden_size).to(torch.bfloat16)
    inside_s: list[float] = []
    with ExitStack() as stack:
        chains = {
            f"{kind} {length}": Chain(stack.enter_context(make(length)), hidden)
            for kind, make in (("worker", workers), ("bare", forwarders))
            for length in (SHORT, LONG)
        }
        time.sleep(1)
        say(f"{options.rounds} rounds of {options.laps} laps through each of {len(chains)} chains")

        def laps(name: str) -> float:
            median_s = chains[name].laps(options.laps)
            if name == f"worker {LONG}":
                inside_s.append(chains[name].inside_s())
            return median_s

        lap_s = in_turns({name: lambda name=name: laps(name) for name in chains}, options.rounds)  # type: ignore[misc]
    publish(figures(lap_s, inside_s), options)


def worker_main() -> int:
    """A stage worker as the launcher starts it, its stages without layers."""
    import stage_worker.worker
    from stage_worker.cli import main as worker

    stage_worker.worker.load_stage = empty_stage
    return worker(sys.argv[2:])


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER_WORD]:
        sys.exit(worker_main())
    main()
