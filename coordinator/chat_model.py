"""A GLM model that runs in stage workers, for use from Python: `with launch(model, plan) as chat_model: ...`."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from coordinator.answer import Answer
from coordinator.bring_up import bring_up
from coordinator.chain import FIRST_EPOCH
from coordinator.closing import Closing
from coordinator.cluster import Cluster
from coordinator.cluster_settings import ClusterSettings, Listening, ProgressSink
from coordinator.engine import Engine
from coordinator.errors import ClosedError, PlanError, UsageError
from coordinator.launcher import LogSink
from coordinator.limits import default_kv_tokens, limits_of, max_step_tokens
from coordinator.memory import NoteSink
from coordinator.mending import Mender
from coordinator.model_identity import identity_of
from coordinator.model_text import ModelText, read_model_text
from coordinator.plan import Plan, describe_stages
from coordinator.plan_request import PlanRequest
from coordinator.plan_wish import wanted_plan
from coordinator.planning import PlanSource, plan_for
from coordinator.prompts import Prompt, ReadPrompt, check_prompt, from_wire, max_model_len, prompt_ids, to_wire
from coordinator.recovery import DEFAULT_RECOVERY, RecoveryPolicy
from coordinator.replanning import Replanner
from coordinator.runtime_dir import RuntimeDir
from coordinator.scheduler import scheduler_settings
from coordinator.sequence import Sequence
from coordinator.supervisor import Supervisor
from coordinator.talking import StreamEvent, Talking
from glm.checkpoint import ModelSource
from glm.config import ModelConfig, load_config
from glm.demo import demo_model_dir
from glm.ends import Embedding, Head
from glm.home import expanded
from glm.hub import find_model, resolve_description, resolve_model
from glm.logprobs import TokenLogprob
from glm.model_source import check_weights, made_for, open_checkpoint
from glm.positions import prompt_layout
from glm.sampling import Sampler, SamplingParams
from glm.sampling_params import seed_after
from glm.speculation import PromptLookup
from glm.tokenizer import Tokenizer
from protocol import client
from protocol.limits import clip_text
from protocol.records import with_changes


def launch(
    model: str | Path | None = None,
    plan: PlanSource | Mapping[str, Any] = None,
    *,
    layers: Mapping[str, str] | Iterable[str] | None = None,
    stages: int | None = None,
    revision: str | None = None,
    chat_format: str | None = None,
    text: ModelText | None = None,
    on_progress: ProgressSink | None = None,
    on_log: LogSink | None = None,
    on_note: NoteSink | None = None,
    record_hidden_states: bool = False,
    check_memory: bool = True,
    speculate: bool = True,
    reuse: bool = True,
    steps_in_flight: int | None = None,
    recovery: RecoveryPolicy = DEFAULT_RECOVERY,
    listening: Listening | None = None,
    on_started: Callable[[Cluster], None] = lambda _: None,
    runtime_dir: RuntimeDir | None = None,
) -> "ChatModel":
    """Start the workers of a plan and load a model into them.

    Args:
        model: a directory, hub id or `random:SHAPE`; None is the plan's, or the demo model that comes with glmpipe.
        plan: a Plan, a plan file's path or what it would hold as a dict; None for all layers on a CPU stage in fp32.
        layers, stages: in place of a plan, `["cuda:0=1-16", "cpu=17-28"]` or a dict of these; a number of CPU stages.
        chat_format: overrides the one found from the model's files. text: what the caller has read of these already.
        on_progress, on_log: receive load progress, and the workers' log lines. recovery: how often to restart those.
        on_note: receives what each device's memory is going to hold. check_memory: refuse a plan that does not fit.
        speculate: guess tokens, and verify several in one step. reuse: keep what ended requests cached.
        listening: where workers of other hosts join, and the keys that let them in. on_started: is given the cluster.
        runtime_dir: where its sockets live, closed with it. steps_in_flight: of decode; None finds the fastest number.

    Raises:
        GlmError: the model is not usable. PlanError: the plan is not. LaunchError (NotEnoughMemory): a worker is not.
    """
    wish, note = wanted_plan(plan, layers, stages), on_note or (lambda _: None)
    model, revision = _named(model, revision, wish)
    description, config, checked_plan = _planned(model, revision, wish, listening, note)
    text = text or _whole_text(description, config, chat_format, note)
    here = _weights_here(model, revision, config)
    most_kv_tokens = default_kv_tokens(checked_plan, config.max_context)
    told = (description, "" if here is None else here.fingerprint(), FIRST_EPOCH, most_kv_tokens, record_hidden_states)
    settings = ClusterSettings(*told, _name_elsewhere(model), revision, config.hidden_size)
    cluster = Cluster(checked_plan, settings, on_progress, on_log, on_note, listening, runtime_dir)
    try:
        on_started(cluster)
        mender = Mender(cluster, recovery, note, choose=Replanner(config, most_kv_tokens, refuse=check_memory))
        fetch = partial(_fetched_weights, model, revision, config, note)
        embedding, head, model_dir = bring_up(cluster, mender, here, fetch, config, note, refuse=check_memory)
        wishes = {"steps_in_flight": steps_in_flight, "speculate": speculate, "reuse": reuse}
        engine = _engine(cluster, embedding, head, config, wishes)
        return ChatModel(cluster, engine, config, model_dir, text, mender)
    except BaseException:
        cluster.close()
        raise


def _planned(
    model: str | Path, revision: str | None, wish: PlanSource, listening: Listening | None, note: NoteSink
) -> tuple[Path, ModelConfig, Plan]:
    """Where the model's small files are, its config, and the checked plan for it."""
    description = resolve_description(model, revision, note)
    config = load_config(description)
    plan = plan_for(wish, config.num_layers, **asdict(made_for(description)), limits=limits_of(config))
    check_hosts(plan, listening)
    return description, config, plan


def _engine(
    cluster: Cluster, embedding: Embedding, head: Head, config: ModelConfig, wishes: Mapping[str, Any]
) -> Engine:
    """Over a cluster that serves; `wishes` are settings that no plan names."""
    limits = scheduler_settings(cluster.plan, cluster.default_kv_budget_tokens, max_step_tokens(config))
    engine = Engine(embedding, head, cluster.pipeline, replace(limits, **wishes))
    engine.start_over(cluster.epoch)
    return engine


def _named(model: object, revision: str | None, wish: PlanSource) -> tuple[str | Path, str | None]:
    """Which model is meant, and of which revision. Raises UsageError: it is no name."""
    if model is None and isinstance(wish, PlanRequest) and wish.model is not None:
        model, revision = wish.model, revision or wish.revision
    if model is None:
        return demo_model_dir(), revision
    if not isinstance(model, str | Path):
        raise UsageError(f"model is a {type(model).__name__}; it must be a directory, a hub id or random:SHAPE")
    return model, revision


def _whole_text(model_dir: Path, config: ModelConfig, chat_format: str | None, on_note: NoteSink) -> ModelText:
    text = read_model_text(model_dir, config, chat_format)
    text.check_files()
    for note in text.notes():
        on_note(f"note: {note}")
    return text


def _weights_here(model: str | Path, revision: str | None, config: ModelConfig) -> ModelSource | None:
    """The model's weights, None of a hub's that are not here yet."""
    found = find_model(model, revision)
    return None if found is None else _whole_weights(found, config)


def _fetched_weights(model: str | Path, revision: str | None, config: ModelConfig, note: NoteSink) -> ModelSource:
    return _whole_weights(resolve_model(model, revision, note), config)


def _whole_weights(model_dir: Path, config: ModelConfig) -> ModelSource:
    checkpoint = open_checkpoint(model_dir)
    check_weights(checkpoint, config)
    return checkpoint


def _name_elsewhere(model: str | Path) -> str:
    """What other hosts find the model by: the demo model comes along, a directory is looked for in the same place."""
    if expanded(model).is_dir():
        path = expanded(model).absolute()
        return "" if path == demo_model_dir() else str(path)
    return str(model)


def check_hosts(plan: Plan, listening: Listening | None) -> None:
    """Raises PlanError for stages of other hosts that are told no place to join."""
    hosts = sorted({stage.host for stage in plan.stages if stage.host is not None})
    if hosts and listening is None:
        raise PlanError([f"stages of {', '.join(hosts)} need a place to join: add --listen tcp://ADDRESS_OF_THIS_HOST"])


class ChatModel(Talking, Closing):
    """Chat and generation through a running pipeline. A context manager.

    Several threads may ask at once: their answers go on together, a step being whoever's turn it is. `cancel` may be
    called in a signal handler, too. What was closed raises ClosedError.
    """

    def __init__(
        self,
        cluster: Cluster,
        engine: Engine,
        config: ModelConfig,
        model_dir: Path,
        text: ModelText | None = None,
        mender: Mender | None = None,
    ) -> None:
        self.cluster = cluster
        self.engine = engine
        self.supervisor = Supervisor(engine, cluster, mender or Mender(cluster, DEFAULT_RECOVERY))
        self.config = config
        self.model_dir = model_dir
        self._text = text or read_model_text(model_dir, config)
        self.defaults = self._text.defaults
        self._cancels: list[threading.Event] = []
        self._lock = threading.RLock()
        self._is_closed = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerError: the model directory has none, and what that means.
        """
        return self._text.tokenizer

    def describe(self) -> client.Description:
        """What runs here: model, family, context, where each part went, sampling defaults."""
        identity = identity_of(self.model_dir, self.config, self.cluster.plan, self._text, self._fingerprint)
        return client.Description(
            request_id=0,
            model_name=identity.name,
            fingerprint=identity.fingerprint,
            precision=identity.precision,
            chat_format=identity.chat_format,
            family=self.config.family,
            max_context=max_model_len(self.config, self.engine.settings),
            plan_lines=describe_stages(self.cluster.plan),
            defaults=to_wire(self.defaults.sampling),
            waits_for=self.waits_for(),
        )

    @cached_property
    def _fingerprint(self) -> str:
        return open_checkpoint(self.model_dir).fingerprint()

    def waits_for(self) -> str | None:
        """What keeps the stages from serving, such as a worker that was lost; None while they serve."""
        words = self.supervisor.waits_for()
        return None if words is None else clip_text(words)

    def stream(self, prompt: Prompt, sampling: client.SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Generate for a prompt: any number of Delta, then one Finished.

        Closing the iterator, or `cancel`, stops the answer.

        Raises:
            GenerationError: this request failed; the model goes on. A lost stage is brought back.
        """
        cancelled = threading.Event()
        self._cancels.append(cancelled)
        try:
            answer = self.begin(prompt, sampling)
            try:
                while (delta := self._go_on(answer, cancelled)) is not None or not answer.sequence.is_finished:
                    if delta is not None:
                        yield delta
            finally:
                with self._lock:
                    self.engine.cancel(answer.sequence)
        finally:
            self._cancels.remove(cancelled)
        if answer.sequence.error is not None:
            raise answer.sequence.error
        tail, finished = answer.close(self.engine.pacing.reason())
        if tail is not None:
            yield tail
        yield finished

    def _go_on(self, answer: Answer, cancelled: threading.Event) -> client.Delta | None:
        """One walk of the chain; what is new in an answer, also where another thread's walk has brought it."""
        with self._lock:
            self._check_open()
            if cancelled.is_set():
                self.engine.cancel(answer.sequence)
            if answer.sequence.is_finished:
                return None
            stepped = self.step([answer])
            return stepped[0][1] if stepped else self._look_at(answer)

    def begin(
        self,
        prompt: Prompt,
        sampling: client.SamplingParams | None = None,
        request_id: int = 0,
        *,
        num_logprobs: int | None = None,
        leader: Sequence | None = None,
    ) -> Answer:
        """Queue a request; `step` moves it on.

        Args:
            num_logprobs: note each new token's log-probability, and those of so many of the likeliest ones.
            leader: a request with the same prompt, whose work this one shares as far as the family allows.

        Raises:
            GenerationError: it does not fit the model's context. TokenizerError: text for a model without tokenizer.
        """
        return self.enter(self.read(prompt, sampling), request_id, num_logprobs=num_logprobs, leader=leader)

    def read(self, prompt: Prompt, sampling: client.SamplingParams | None = None) -> ReadPrompt:
        """Everything about a request that takes longer with longer texts. May be called in any thread.

        Raises as `begin`.
        """
        params = self.defaults.sampling if sampling is None else from_wire(sampling)
        ids = self.prompt_ids(prompt)
        check_prompt(ids, self.config, self.engine.settings)
        return ReadPrompt(
            ids,
            params,
            Sampler(params, ids, guard_id=self.defaults.guard_id),
            PromptLookup(ids) if self.engine.settings.speculate else None,
            is_chat=isinstance(prompt, client.ChatPrompt),
        )

    def enter(
        self,
        prompt: ReadPrompt,
        request_id: int = 0,
        *,
        num_logprobs: int | None = None,
        leader: Sequence | None = None,
    ) -> Answer:
        """Queue what was read; see `begin`."""
        params = prompt.params
        # A prompt beyond a bound that is not the model's own has all of its context.
        bound = self.defaults.max_length
        max_length = bound if len(prompt.token_ids) < bound else self.config.max_context
        sequence = Sequence(
            self.engine.new_sequence_id(),
            prompt.token_ids,
            prompt.sampler,
            layout=prompt_layout(prompt.token_ids, self.config),
            end_ids=frozenset() if params.ignore_eos else frozenset(self.defaults.end_ids),
            max_new_tokens=params.max_new_tokens,
            max_length=max_length,
            max_context=max_model_len(self.config, self.engine.settings),
            num_logprobs=num_logprobs,
            leader=leader,
        )
        sequence.drafter = prompt.drafter
        with self._lock:
            self._check_open()
            self.engine.add(sequence)
        return Answer(
            sequence,
            self.cluster.plan,
            request_id=request_id,
            tokenizer=self._text.found,
            config=self.config,
            stop=params.stop,
            end_ids=() if params.ignore_eos else self.defaults.end_ids,
            clean=prompt.is_chat,
        )

    def begin_many(
        self,
        prompt: Prompt,
        sampling: client.SamplingParams | None = None,
        num_answers: int = 1,
        *,
        num_logprobs: int | None = None,
    ) -> list[Answer]:
        """Queue several answers to one prompt, which is computed once where the family is causal.

        Answer i has the seed of `sampling` plus i: each is what a request with that seed gets. Raises as `begin`.
        """
        sampling = sampling or to_wire(self.defaults.sampling)
        answers: list[Answer] = []
        for index in range(num_answers):
            own = with_changes(sampling, seed=seed_after(sampling.seed, index))
            leader = answers[0].sequence if answers and not self.config.is_prefix_lm else None
            answers.append(self.begin(prompt, own, num_logprobs=num_logprobs, leader=leader))
        return answers

    def score(self, token_ids: AbstractSequence[int], *, num_prompt: int | None = None) -> list[TokenLogprob]:
        """The log-probability of every token, given those before it.

        Of a causal family that is all tokens but the first. Of a prefix LM it is those behind the prompt, `num_prompt`
        tokens that end with the bos token: its tokens see each other both ways.

        Raises:
            GenerationError: it does not fit the model's context, or a stage could not do it.
        """
        check_prompt(token_ids, self.config, self.engine.settings)
        layout = prompt_layout(token_ids[:num_prompt], self.config)
        sequence = Sequence(
            self.engine.new_sequence_id(),
            token_ids,
            Sampler(SamplingParams(greedy=True), guard_id=self.defaults.guard_id),
            layout=layout,
            end_ids=frozenset(),
            max_new_tokens=0,
            max_length=self.config.max_context,
            max_context=self.config.max_context,
            wants_prompt_logprobs=True,
        )
        with self._lock:
            self._check_open()
            self.engine.add(sequence)
        try:
            while not sequence.is_finished:
                self.walk({})
        finally:
            with self._lock:
                self.engine.cancel(sequence)
        if sequence.error is not None:
            raise sequence.error
        return sequence.prompt_logprobs

    def step(self, answers: AbstractSequence[Answer]) -> list[tuple[Answer, client.Delta]]:
        """One walk of the chain for all queued requests; what became final in the given answers."""
        walked = self.walk({answer.sequence.sequence_id: answer for answer in answers})
        return [(answer, delta) for answer, delta in walked if delta is not None]

    def walk(self, answers: Mapping[int, Answer]) -> list[tuple[Answer, client.Delta | None]]:
        """As `step`: of the answers, by sequence id, all those that took part or ended. What others there are costs
        nothing.
        """
        walked = []
        with self._lock:
            self._check_open()
            for sequence, timing in self.supervisor.step():
                answer = answers.get(sequence.sequence_id)
                if answer is not None:
                    answer.follow(self.cluster.plan)
                    answer.account(timing)
                    walked.append((answer, self._look_at(answer)))
        return walked

    def _look_at(self, answer: Answer) -> client.Delta | None:
        """What became final in an answer since the last look; where that ends it, nothing more is computed for it."""
        delta = None
        with answer.sequence.failing("the answer could not be decoded"):
            delta = answer.advance()
        if answer.found_stop_string or answer.sequence.error is not None:
            self.engine.cancel(answer.sequence)
        return delta

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the model was closed: launch it again")

    def cancel(self) -> None:
        """Stop the answers that `stream` is giving, after the step under way."""
        for cancelled in tuple(self._cancels):
            cancelled.set()

    def close(self) -> None:
        """Stop the workers and leave nothing behind. Safe to call twice, and while other threads wait for answers."""
        self._is_closed = self.cluster.is_closing = True
        with self._lock:
            self.engine.suspend()
            self.cluster.close()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids a prompt becomes.

        Raises:
            TokenizerError: it is text, and the model directory has no tokenizer.
        """
        return prompt_ids(prompt, lambda: self.tokenizer)
