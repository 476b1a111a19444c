"""Opening what a command talks to: a model launched for it, or a launch that already runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from coordinator.commands.options import (
    check_scheduling,
    choose_cache,
    plan_request,
    refuse_with_connect,
    sampling_overrides,
    wrong_use,
)
from coordinator.errors import UsageError
from coordinator.log import JsonLog, Log, QuietLog, shown, to_stderr
from coordinator.plan import QUANTIZED
from coordinator.progress import load_view
from coordinator.signals import signals_unwind
from protocol.records import with_changes

if TYPE_CHECKING:
    from pathlib import Path

    from coordinator.chat_model import ChatModel
    from coordinator.cluster import Cluster
    from coordinator.cluster_settings import Listening
    from coordinator.conversation import ChatBackend, Wanted
    from coordinator.mending import Mender
    from coordinator.model_identity import ModelIdentity
    from coordinator.model_text import ModelText
    from coordinator.plan import Plan
    from coordinator.plan_request import PlanRequest
    from coordinator.runtime_dir import RuntimeDir
    from coordinator.scheduler import SchedulerSettings
    from coordinator.trace import TraceFile
    from coordinator.watch_view import WatchView
    from glm.config import ModelConfig
    from protocol.client import ChatTurn, SamplingParams


@contextmanager
def launched(
    options: argparse.Namespace,
    request: PlanRequest | None = None,
    *,
    show_logs: bool = False,
    record_hidden_states: bool = False,
    check: Callable[[Chosen], None] = lambda _: None,
    wanted: Wanted | None = None,
    system: tuple[ChatTurn, ...] = (),
    on_started: Callable[[Cluster], None] = lambda _: None,
    runtime_dir: RuntimeDir | None = None,
    identify: Callable[[ModelIdentity], None] | None = None,
) -> Iterator[ChatModel]:
    """Launch the model that the options name where they say, telling stderr where each part goes and how far it is.

    `request` replaces what the placement options ask for. The plan is checked before anything loads, and so is what
    `check` raises for. `wanted` is what is going to be asked with; None is whatever the model can be asked with.
    `system` is the turn of a system prompt, or of tools, that it will get; `identify` is told who will answer.
    Nothing is left when the block ends. Of the workers' lines warnings go to stderr, all with `show_logs`.
    """
    request = plan_request(options) if request is None else request
    check_scheduling(options)
    choose_cache(options)
    listening = _listening(options)
    log = log_of(options)
    from coordinator.chat_model import launch
    from coordinator.limits import context_line
    from coordinator.terminal import around_stops

    chosen = _choose(options, request, listening, log, check, wanted, system)
    _identify(chosen, identify)
    with ExitStack() as stack:
        observers = _traces(options, chosen.plan, stack, log)

        def started(cluster: Cluster) -> None:
            stack.enter_context(around_stops(cluster.pause, cluster.resume))
            on_started(cluster)

        with load_view(chosen.plan, log=log) as view:
            chat_model = launch(
                chosen.model,
                chosen.plan,
                revision=chosen.revision,
                text=chosen.text,
                on_progress=view.update,
                on_log=view.log if show_logs or options.verbose else _only_warnings(view.log),
                on_note=view.log,
                record_hidden_states=record_hidden_states,
                **_scheduling(options),
                listening=listening,
                on_started=started,
                runtime_dir=runtime_dir,
            )
            stack.enter_context(chat_model)
            chat_model.supervisor.mender.on_event = lambda text: _say_pipeline(log, chat_model, text)
            chat_model.engine.observers += observers
        log.say(*_kernel_lines(chat_model))
        log.say(context_line(chat_model.cluster.plan, chosen.config.max_context, chat_model.cluster.kv_budgets))
        with signals_unwind():
            yield chat_model


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen:
    """What is going to be launched; all of it has been checked, as far as that is possible without loading."""

    model: str | Path
    revision: str | None
    config: ModelConfig
    plan: Plan
    text: ModelText

    @property
    def settings(self) -> SchedulerSettings:
        """What the scheduler will allow, unless memory turns out to hold fewer KV tokens."""
        from coordinator.limits import default_kv_tokens, max_step_tokens
        from coordinator.scheduler import scheduler_settings

        kv_tokens = default_kv_tokens(self.plan, self.config.max_context)
        return scheduler_settings(self.plan, kv_tokens, max_step_tokens(self.config))


def _choose(
    options: argparse.Namespace,
    request: PlanRequest,
    listening: Listening | None,
    log: Log,
    check: Callable[[Chosen], None],
    wanted: Wanted | None,
    system: tuple[ChatTurn, ...],
) -> Chosen:
    """Find the model, check all that can be, say the plan; the weights of a hub's model are not fetched yet."""
    from coordinator.chat_model import check_hosts
    from coordinator.limits import limits_of
    from coordinator.plan import describe
    from coordinator.planning import notes, plan_for
    from glm.config import load_config
    from glm.demo import demo_model_dir
    from glm.hub import find_model, resolve_description
    from glm.model_source import made_for

    model = options.model or request.model or demo_model_dir()
    revision = options.revision or request.revision
    description = resolve_description(model, revision, log.say)
    config = load_config(description)
    plan = plan_for(request, config.num_layers, **dataclasses.asdict(made_for(description)), limits=limits_of(config))
    check_hosts(plan, listening)
    text, doubts = _model_text(description, config, wanted, options.chat_format, system)
    chosen = Chosen(model, revision, config, plan, text)
    check(chosen)
    log.say(*describe(plan, verbose=options.verbose), event="plan")
    log.say(
        *(f"note: {note}" for note in (*notes(request, plan), *doubts)),
        *_cache_notes(find_model(model, revision), config, plan),
    )
    return chosen


def _identify(chosen: Chosen, identify: Callable[[ModelIdentity], None] | None) -> None:
    """Of a model whose weights are still to be fetched nobody knows; it is told once more when it answers."""
    from coordinator.model_identity import identity_of
    from glm.hub import find_model
    from glm.model_source import open_checkpoint

    model_dir = None if identify is None else find_model(chosen.model, chosen.revision)
    if model_dir is not None and identify is not None:
        fingerprint = open_checkpoint(model_dir).fingerprint()
        identify(identity_of(model_dir, chosen.config, chosen.plan, chosen.text, fingerprint))


def _model_text(
    model_dir: Path,
    config: ModelConfig,
    wanted: Wanted | None,
    chat_format: str | None,
    system: tuple[ChatTurn, ...],
) -> tuple[ModelText, tuple[str, ...]]:
    """The model's tokenizer and chat format, before its weights are fetched or loaded, and what to note about them."""
    from coordinator.model_text import read_model_text

    text = read_model_text(model_dir, config, chat_format)
    if wanted is not None:
        text.check(wanted, system)
        return text, text.notes(wanted)
    doubt = text.check_files()
    return text, (*text.notes(), *(() if doubt is None else (doubt,)))


def log_of(options: argparse.Namespace) -> Log:
    """Where a command with these options says what happens."""
    if getattr(options, "log_json", False):
        return JsonLog()
    return QuietLog() if getattr(options, "quiet", False) else Log()


def _say_pipeline(log: Log, chat_model: ChatModel, text: str) -> None:
    line = text if log.is_json else f"[pipeline] {text}"
    log.say(line, event="pipeline", level="warning", epoch=chat_model.cluster.epoch)


def _listening(options: argparse.Namespace) -> Listening | None:
    """Where other hosts come in. Raises UsageError without a key, so that nothing loads in vain."""
    if options.listen is None:
        for name, value in (("keys", options.keys), ("await-worker", options.await_worker)):
            if value is not None:
                raise UsageError(f"--{name} {value} is for other hosts; add --listen tcp://ADDRESS_OF_THIS_HOST")
        return None
    from coordinator.cluster_settings import AWAIT_WORKER_S, Listening
    from coordinator.door import listen_endpoint
    from protocol.key_files import KeyDirectory

    keys = KeyDirectory(options.keys)
    await_s = AWAIT_WORKER_S if options.await_worker is None else options.await_worker
    with wrong_use():
        endpoint = listen_endpoint(options.listen)
        keys.own()
    shows_tokens = sys.stderr.isatty() and type(log_of(options)) is Log
    return Listening(endpoint, keys, await_s, shows_tokens)


def _scheduling(options: argparse.Namespace) -> dict[str, Any]:
    from coordinator.recovery import RecoveryPolicy

    return {
        "check_memory": not options.no_memory_check,
        "speculate": not options.no_speculation,
        "reuse": not options.no_prefix_reuse,
        "steps_in_flight": options.steps_in_flight,
        "recovery": RecoveryPolicy(max_attempts=options.recovery_attempts, replan=options.replan),
    }


@contextmanager
def opened(
    options: argparse.Namespace,
    wanted: Wanted,
    check: Callable[[Chosen], None] = lambda _: None,
    *,
    system: tuple[ChatTurn, ...] = (),
    identify: Callable[[ModelIdentity], None] | None = None,
) -> Iterator[ChatBackend]:
    """The running launch that `--connect` means, or a model launched for this command, if `check` raises nothing."""
    if options.connect is None:
        with launched(options, check=check, wanted=wanted, system=system, identify=identify) as chat_model:
            yield chat_model
        return
    refuse_with_connect(options)
    from coordinator.client import connect
    from coordinator.which_launch import FIND_S, endpoint_of

    log = log_of(options)

    def say_looking(find_s: float) -> None:
        wanted = f"launch with pid {options.connect}" if options.connect.isdecimal() else "running `glmpipe launch`"
        log.say(f"no {wanted} is seen yet; looking for one for {find_s:g} s")

    with wrong_use():
        endpoint = endpoint_of(options.connect or None, find_s=FIND_S, on_looking=say_looking)

    def say_waiting(waits_for: str) -> None:
        log.say(f"the launch is not ready yet, it waits for {waits_for}")

    with connect(endpoint, on_waiting=say_waiting) as backend:
        waits_for = backend.describe().waits_for
        if waits_for is not None:
            log.say(f"the launch does not serve at the moment, it waits for {waits_for}")
        backend.on_queued = partial(_say_queued, log)
        with signals_unwind():
            yield backend


def _say_queued(log: Log, position: int, waits_for: str | None) -> None:
    why = "for room at the launch" if waits_for is None else f"as the launch itself waits for {waits_for}"
    log.say(f"waiting {why}; place {position} in its queue")


def _traces(options: argparse.Namespace, plan: Plan, stack: ExitStack, log: Log) -> list[TraceFile]:
    """What `--trace` asks for; the file is complete when the stack unwinds. Raises UsageError."""
    path = getattr(options, "trace", None)
    if path is None:
        return []
    from pathlib import Path

    from coordinator.trace import TraceFile

    return [stack.enter_context(TraceFile(Path(path), plan, log.say))]


def check_watch(options: argparse.Namespace) -> None:
    """Raises UsageError for a `--watch` without a terminal to draw on."""
    if options.watch and not sys.stderr.isatty():
        raise UsageError("--watch draws on the terminal, and stderr is none here: drop it, or look at a --trace later")


@contextmanager
def watched(options: argparse.Namespace, chat_model: ChatModel) -> Iterator[WatchView | None]:
    """The panel that `--watch` asks for, on the terminal while the block runs."""
    if not options.watch:
        yield None
        return
    from coordinator.watch_view import WatchView

    engine, cluster = chat_model.engine, chat_model.cluster
    with WatchView(cluster.plan, cluster.kv_budgets, engine.load) as view:
        engine.observers.append(view)
        chat_model.supervisor.on_replanned.append(lambda: view.show(cluster.plan, cluster.kv_budgets))
        try:
            with told_of_events(view, chat_model.supervisor.mender):
                yield view
        finally:
            engine.observers.remove(view)


@contextmanager
def told_of_events(view: WatchView, mender: Mender) -> Iterator[None]:
    """Within the block the panel hears what a mender says of lost stages, too."""
    say = mender.on_event

    def tell_and_say(event: str) -> None:
        view.tell(event)
        say(event)

    mender.on_event = tell_and_say
    try:
        yield
    finally:
        mender.on_event = say


def _kernel_lines(chat_model: ChatModel) -> list[str]:
    """What computes lm_head (each stage has said so itself); why that is slower on a CPU than it could be, if it is."""
    from coordinator.plan import wants_native_kernels
    from glm.kernels.diagnosis import native_state

    lines = [f"lm_head computes with {chat_model.engine.head.kernel_path}"]
    complaint = native_state().complaint
    if complaint is not None and wants_native_kernels(chat_model.cluster.plan):
        lines.append(f"note: {complaint}")
    return lines


def _cache_notes(model_dir: Path | None, config: ModelConfig, plan: Plan) -> tuple[str, ...]:
    """A line where layers are going to be quantised and kept that were not before; `model_dir` None is yet to come."""
    from glm.cache_dir import cache_dir
    from glm.layer_cache import is_to_be_kept, is_worth_keeping
    from glm.model_source import open_checkpoint
    from glm.precision import Precision

    cache = cache_dir()
    precisions = {Precision(stage.precision) for stage in plan.stages if stage.precision in QUANTIZED}
    if cache is None or not precisions:
        return ()
    if model_dir is None:
        are_kept = any(is_worth_keeping(config, precision) for precision in precisions)
    else:
        checkpoint = open_checkpoint(model_dir)
        are_kept = any(is_to_be_kept(checkpoint, config, precision, cache) for precision in precisions)
    if not are_kept:
        return ()
    return (
        f"note: quantised layers are kept in {cache} for the next time (see `glmpipe cache`; --no-cache keeps none)",
    )


def chosen_sampling(options: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The model's defaults with what the options override."""
    from glm.sampling_params import chosen_over

    return with_changes(defaults, **chosen_over(sampling_overrides(options)))


def check_sampling(options: argparse.Namespace) -> None:
    """Refuse impossible sampling options before anything is loaded. Raises UsageError or SamplingError."""
    given = sampling_overrides(options)
    from glm.sampling_params import SamplingParams

    SamplingParams(**given)


def check_writable(path: Path, name: str) -> None:
    """Of a file that is to be replaced: found out now rather than after a large model has loaded."""
    if path.is_dir():
        raise UsageError(f"{name} {path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{name} {path} is a device or a socket, which would be replaced; name a file")
    if not path.parent.is_dir():
        raise UsageError(f"{name} {path}: the directory {path.parent} does not exist; create it first")
    if not all(os.access(place, os.W_OK) for place in (path, path.parent) if place.exists()):
        raise UsageError(f"{name} {path} is not writable; choose another place")


def say(*lines: str) -> None:
    """To stderr: everything that is not the command's result."""
    for line in lines:
        to_stderr(shown(line))


def _only_warnings(log: Callable[[str], None]) -> Callable[[str], None]:
    """What users need not act on stays out of their chat; the launcher keeps a worker's last lines for errors."""

    def filtered(line: str) -> None:
        _, _, text = line.partition("] ")
        if text.startswith(("WARNING", "ERROR", "CRITICAL")):
            log(line)

    return filtered
