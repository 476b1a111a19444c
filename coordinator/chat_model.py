"""A GLM model that runs in stage workers, for use from Python: `with launch(model, plan) as chat_model: ...`."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from coordinator.errors import PlanError
from coordinator.launcher import LogSink
from coordinator.limits import default_kv_tokens, limits_of, max_step_tokens
from coordinator.memory import NoteSink
from coordinator.mending import Mender
from coordinator.model_identity import identity_of
from coordinator.model_text import ModelText, read_model_text
from coordinator.plan import Plan, describe_stages
from coordinator.planning import PlanSource, plan_for
from coordinator.prompts import Prompt, ReadPrompt, check_prompt, from_wire, max_model_len, prompt_ids, to_wire
from coordinator.recovery import DEFAULT_RECOVERY, RecoveryPolicy
from coordinator.replanning import Replanner
from coordinator.report import cut_note
from coordinator.runtime_dir import RuntimeDir
from coordinator.scheduler import scheduler_settings
from coordinator.sequence import Sequence
from coordinator.supervisor import Supervisor
from coordinator.tools import tools_text
from glm.checkpoint import ModelSource
from glm.config import ModelConfig, load_config
from glm.demo import demo_model_dir
from glm.home import expanded
from glm.hub import find_model, resolve_description, resolve_model
from glm.logprobs import TokenLogprob
from glm.model_source import check_weights, made_for, open_checkpoint
from glm.positions import prompt_layout
from glm.sampling import Sampler, SamplingParams
from glm.sampling_params import chosen_over, seed_after
from glm.speculation import PromptLookup
from glm.tokenizer import Tokenizer
from protocol import client
from protocol.limits import clip_text
from protocol.records import with_changes

History = list[dict[str, Any]]
StreamEvent = client.Delta | client.Finished


def launch(
    model: str | Path | None = None,
    plan: PlanSource = None,
    *,
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
        model: a directory, hub id or `random:SHAPE`; None is the demo model that comes with glmpipe.
        plan: a Plan, a plan file's path, or None for all layers on one CPU stage in fp32.
        chat_format: overrides the one found from the model's files. text: what the caller has read of these already.
        on_progress, on_log: receive load progress, and the workers' log lines. recovery: how often to restart those.
        on_note: receives what each device's memory is going to hold. check_memory: refuse a plan that does not fit.
        speculate: guess tokens, and verify several in one step. reuse: keep what ended requests cached.
        listening: where workers of other hosts join, and the keys that let them in. on_started: is given the cluster.
        runtime_dir: where its sockets live, closed with it. steps_in_flight: of decode; None finds the fastest number.

    Raises:
        GlmError: the model is not usable. PlanError: the plan is not. LaunchError (NotEnoughMemory): a worker is not.
    """
    model, note = demo_model_dir() if model is None else model, on_note or (lambda _: None)
    description = resolve_description(model, revision, note)
    config = load_config(description)
    checked_plan = plan_for(plan, config.num_layers, **asdict(made_for(description)), limits=limits_of(config))
    check_hosts(checked_plan, listening)
    text = text or _whole_text(description, config, chat_format, note)
    here = _weights_here(model, revision, config)
    most_kv_tokens = default_kv_tokens(checked_plan, config.max_context)
    told = (description, "" if here is None else here.fingerprint(), FIRST_EPOCH, most_kv_tokens, record_hidden_states)
    settings = ClusterSettings(*told, _name_elsewhere(model), revision, config.hidden_size)
    cluster = Cluster(checked_plan, settings, on_progress, on_log, on_note, listening, runtime_dir)
    try:
        on_started(cluster)
        choose = Replanner(config, most_kv_tokens, refuse=check_memory)
        mender = Mender(cluster, recovery, note, choose=choose)
        fetch = partial(_fetched_weights, model, revision, config, note)
        embedding, head, model_dir = bring_up(cluster, mender, here, fetch, config, note, refuse=check_memory)
        limits = scheduler_settings(cluster.plan, cluster.default_kv_budget_tokens, max_step_tokens(config))
        scheduling = replace(limits, steps_in_flight=steps_in_flight, speculate=speculate, reuse=reuse)
        engine = Engine(embedding, head, cluster.pipeline, scheduling)
        engine.start_over(cluster.epoch)
        return ChatModel(cluster, engine, config, model_dir, text, mender)
    except BaseException:
        cluster.close()
        raise


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


class ChatModel(Closing):
    """Chat and generation through a running pipeline. A context manager; use it from one thread.

    Only `cancel` may be called from another thread or a signal handler.
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
        self._cancelled = threading.Event()

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

    def chat(
        self, query: str, history: AbstractSequence[Mapping[str, Any]] = (), **sampling: Any
    ) -> tuple[str, History]:
        """Answer a question; returns the answer and the history with both appended.

        `history` is a list of `{"role": ..., "content": ...}`; a system message may have `"tools"`, a list of JSON
        objects. `sampling` are fields of `SamplingParams`, those not
        given have the model's defaults.

        Raises:
            GenerationError: the conversation does not fit, or a stage could not do it.
        """
        reply, grown = "", list(map(dict, history))
        for reply, grown in self.stream_chat(query, history, **sampling):  # noqa: B007 - the last one counts
            pass
        return reply, grown

    def stream_chat(
        self, query: str, history: AbstractSequence[Mapping[str, Any]] = (), **sampling: Any
    ) -> Iterator[tuple[str, History]]:
        """As `chat`, yielding the answer so far and the history with it, each time it has grown.

        An answer that breaks off, for want of context or by a bound of the model's files, is warned of.
        """
        asked = [*map(dict, history), {"role": "user", "content": query}]
        turns = tuple(
            client.ChatTurn(m["role"], m.get("metadata", ""), m["content"], tools_text(m.get("tools"))) for m in asked
        )
        text = ""
        for event in self.stream(client.ChatPrompt(turns), self._sampling(sampling)):
            text = event.text if isinstance(event, client.Finished) else text + event.text
            if isinstance(event, client.Finished) and (note := cut_note(event, sampling.get("max_new_tokens"))):
                warnings.warn(note, stacklevel=2)
            yield text, [*asked, {"role": "assistant", "content": text}]

    def generate(self, token_ids: AbstractSequence[int], **sampling: Any) -> client.Finished:
        """Continue token ids as they are; the outcome has `.token_ids` (the new ones), `.text`, `.stats`."""
        outcome: StreamEvent | None = None
        for outcome in self.stream(client.TokenPrompt(tuple(token_ids)), self._sampling(sampling)):  # noqa: B007
            pass
        assert isinstance(outcome, client.Finished)
        return outcome

    def stream(self, prompt: Prompt, sampling: client.SamplingParams | None = None) -> Iterator[StreamEvent]:
        """Generate for a prompt: any number of Delta, then one Finished.

        Closing the iterator, or `cancel`, stops the answer.

        Raises:
            GenerationError: this request failed; the model goes on. A lost stage is brought back.
        """
        self._cancelled.clear()
        answer = self.begin(prompt, sampling)
        try:
            while not answer.sequence.is_finished:
                if self._cancelled.is_set():
                    self.engine.cancel(answer.sequence)
                    break
                for _, event in self.step([answer]):
                    yield event
        finally:
            self.engine.cancel(answer.sequence)
        if answer.sequence.error is not None:
            raise answer.sequence.error
        tail, finished = answer.close(self.engine.pacing.reason())
        if tail is not None:
            yield tail
        yield finished

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
        self.engine.add(sequence)
        try:
            while not sequence.is_finished:
                self.supervisor.step()
        finally:
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
        for sequence, timing in self.supervisor.step():
            answer = answers.get(sequence.sequence_id)
            if answer is None:
                continue
            delta = None
            with sequence.failing("the answer could not be decoded"):
                answer.follow(self.cluster.plan)
                answer.account(timing)
                delta = answer.advance()
            if answer.found_stop_string or sequence.error is not None:
                self.engine.cancel(sequence)
            walked.append((answer, delta))
        return walked

    def cancel(self) -> None:
        """Stop the answer that `stream` is giving, after the step under way."""
        self._cancelled.set()

    def close(self) -> None:
        """Stop the workers and leave nothing behind. Safe to call twice."""
        self.cluster.close()

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids a prompt becomes.

        Raises:
            TokenizerError: it is text, and the model directory has no tokenizer.
        """
        return prompt_ids(prompt, lambda: self.tokenizer)

    def _sampling(self, given: Mapping[str, Any]) -> client.SamplingParams:
        return to_wire(replace(self.defaults.sampling, **chosen_over(given)))
