"""Many requests at once: what is asked, what answers it, and the way from a file of prompts to a file of results."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from coordinator.batch_prompts import BatchDefaults, BatchLine, read_prompts
from coordinator.batch_results import answer, failure
from coordinator.batch_view import Totals
from coordinator.conversation import WANTED, Wanted, form_of, wanted_of
from coordinator.errors import CoordinatorError, GenerationError, PromptFileError
from coordinator.model_identity import identity_in
from coordinator.result_stream import Results
from coordinator.signals import signals_deferred
from glm.errors import GlmError
from glm.sampling_params import chosen_over, seed_after
from protocol.records import with_changes

if TYPE_CHECKING:
    from coordinator.answer import Answer
    from coordinator.chat_model import ChatModel
    from coordinator.conversation import Prompt
    from glm.logprobs import TokenLogprob
    from protocol.client import ChatPrompt, Description, Finished, SamplingParams

FAULTS_TOLD = 20
"""Of a file's faults so many are listed; all are counted."""
MOST_FORMS = 100
"""Of conversations so many forms are tried with the model's chat format before it loads."""
ANSWERS_OPEN = 2
"""So many times `max_num_seqs` answers are open at once: a new one can start in the step after another's end."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how to answer it, `num_answers` times, with the seeds `sampling.seed`, that plus 1, and so on.

    `num_logprobs`: of how many of the likeliest tokens to tell the log-probability beside each chosen token's.
    """

    prompt: Prompt
    sampling: SamplingParams
    num_answers: int = 1
    num_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of the answer with this ticket: `finished`, or else the `error` it failed with by itself."""

    ticket: int
    finished: Finished | None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What came since the last look: tokens of all answers together, and those that ended."""

    num_new_tokens: int
    ended: tuple[Ended, ...]


class BatchBackend(Protocol):
    """What answers many requests at once: a model launched by this program, or a running launch."""

    def describe(self) -> Description:
        """What runs there."""
        ...

    def submit(self, request: Request) -> list[int]:
        """Open a request; a ticket for each of its answers, in order.

        Raises:
            GenerationError, GlmError: it cannot be answered; nothing was opened.
        """
        ...

    def poll(self) -> Progress:
        """Come a little further. Raises what means that the backend is lost: any CoordinatorError."""
        ...

    def drop(self) -> None:
        """Stop all that is open."""
        ...


class LocalBackend:
    """A `BatchBackend` out of a chat model of this process."""

    def __init__(self, chat_model: ChatModel) -> None:
        self._chat_model = chat_model
        self._open: list[Answer] = []
        self._tickets = itertools.count(1)

    def describe(self) -> Description:
        return self._chat_model.describe()

    def submit(self, request: Request) -> list[int]:
        answers = self._chat_model.begin_many(
            request.prompt, request.sampling, request.num_answers, num_logprobs=request.num_logprobs
        )
        for opened in answers:
            opened.request_id = next(self._tickets)
        self._open += answers
        return [opened.request_id for opened in answers]

    def poll(self) -> Progress:
        deltas = self._chat_model.step(self._open)
        ended = [each for each in self._open if each.sequence.is_finished]
        if ended:
            self._open = [each for each in self._open if not each.sequence.is_finished]
        pacing = self._chat_model.engine.pacing.reason() if ended else None
        num_new_tokens = sum(len(delta.token_ids) for _, delta in deltas)
        return Progress(num_new_tokens, tuple(_close(each, pacing) for each in ended))

    def drop(self) -> None:
        dropped, self._open = self._open, []
        for each in dropped:
            self._chat_model.engine.cancel(each.sequence)


def _close(ended: Answer, pacing: str | None) -> Ended:
    sequence = ended.sequence
    if sequence.error is not None:
        return Ended(ended.request_id, None, str(sequence.error))
    _, finished = ended.close(pacing)
    logprobs = None if sequence.num_logprobs is None else tuple(sequence.logprobs[: len(finished.token_ids)])
    return Ended(ended.request_id, finished, None, logprobs)


def answers_to(backend: BatchBackend, request: Request) -> list[Ended]:
    """All answers to one request, in order. Raises GenerationError when it cannot be answered."""
    tickets = backend.submit(request)
    ended: dict[int, Ended] = {}
    try:
        while len(ended) < len(tickets):
            ended |= {each.ticket: each for each in backend.poll().ended}
    except BaseException:
        _drop(backend)
        raise
    return [ended[ticket] for ticket in tickets]


@dataclass(frozen=True, slots=True)
class Job:
    """Answers to one line that are not in the results yet, with consecutive indexes."""

    line: BatchLine
    indexes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file of prompts asks for; `largest_id` is the largest token id, with its line's number.

    `wanted` is what the model must be able to be asked with; `forms` the conversations that differ in who speaks when,
    without what is said, and the first line of each; of very many, the first.
    """

    num_answers: int
    num_missing: int
    largest_id: tuple[int, int] | None
    wanted: Wanted = "chat"
    forms: Mapping[ChatPrompt, int] = field(default_factory=dict)


def survey(prompts: Path, defaults: BatchDefaults, results: Results) -> Survey:
    """Look through all prompts before anything is loaded, without keeping them.

    Raises:
        PromptFileError: lines with faults; all are counted, the first are listed.
        ResultFileError: the results are of other prompts.
    """
    faults = _Faults()
    lines_of_ids: dict[str | int, int] = {}
    num_answers = num_missing = 0
    largest: tuple[int, int] | None = None
    wanted: set[Wanted] = {"token ids"}
    forms: dict[ChatPrompt, int] = {}
    for line in read_prompts(prompts, defaults, faults.add):
        if line.id is not None and lines_of_ids.setdefault(line.id, line.number) != line.number:
            faults.add(f"line {line.number}: the id {line.id!r} is that of line {lines_of_ids[line.id]}, too")
        num_answers += line.num_answers
        if not faults.num_all:
            num_missing += len(results.missing(line))
        wanted.add(wanted_of(line.prompt))
        if len(forms) < MOST_FORMS and (form := form_of(line.prompt)) is not None:
            forms.setdefault(form, line.number)
        ids = getattr(line.prompt, "token_ids", ())
        if ids and (largest is None or max(ids) > largest[1]):
            largest = (line.number, max(ids))
    if faults.num_all:
        raise PromptFileError(prompts, faults.told, faults.num_all)
    results.refuse_strangers()
    return Survey(num_answers, num_missing, largest, max(wanted, key=WANTED.index), forms)


class _Faults:
    """The first faults, and how many there are."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.num_all = 0

    def add(self, fault: str) -> None:
        self.num_all += 1
        if len(self.told) < FAULTS_TOLD:
            self.told.append(fault if len(fault) <= 400 else f"{fault[:400]} ...")


def missing_jobs(prompts: Path, defaults: BatchDefaults, results: Results) -> Iterator[Job]:
    """What is still to be answered, read as it is asked for."""
    for line in read_prompts(prompts, defaults):
        for indexes in _runs(results.missing(line)):
            yield Job(line, indexes)


def _runs(indexes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """(0, 1, 3) -> (0, 1), (3,)."""
    for _, run in itertools.groupby(enumerate(indexes), lambda each: each[1] - each[0]):
        yield tuple(index for _, index in run)


class BatchWatcher(Protocol):
    """Looks at how far a run is."""

    totals: Totals

    def update(self) -> None:
        """The totals may have changed."""
        ...


def run_batch(
    backend: BatchBackend, jobs: Iterable[Job], results: Results, watcher: BatchWatcher, *, most_open: int
) -> None:
    """Answer everything, `most_open` answers at once, and write each answer as it is complete.

    A request that fails by itself gets a line with its error. Whatever ends this early leaves whole lines, and
    `watcher.totals` says how far it came.

    Raises:
        ResultFileError: what is there was answered by another model. ResultsError: no answer can be written.
        Any other CoordinatorError: the backend is lost.
    """
    batch = _Batch(backend, results, watcher.totals)
    waiting = iter(jobs)
    job = next(waiting, None)
    try:
        while job is not None or batch.open:
            while job is not None and (not batch.open or len(batch.open) + len(job.indexes) <= most_open):
                batch.submit(job)
                job = next(waiting, None)
            if batch.open:
                batch.poll()
            watcher.update()
    finally:
        if batch.open:
            _drop(backend)


class _Batch:
    """The answers under way, by ticket."""

    def __init__(self, backend: BatchBackend, results: Results, totals: Totals) -> None:
        self.open: dict[int, tuple[BatchLine, int]] = {}
        self._backend = backend
        self._results = results
        self._totals = totals
        described = backend.describe()
        self._defaults = described.defaults
        model = identity_in(described)
        results.refuse_other_models(model)
        self._model = {"model": model.as_json()}

    def submit(self, job: Job) -> None:
        sampling = with_changes(self._defaults, **chosen_over(job.line.sampling))
        sampling = with_changes(sampling, seed=seed_after(sampling.seed, job.indexes[0]))
        request = Request(job.line.prompt, sampling, len(job.indexes), job.line.num_logprobs)
        try:
            tickets = self._backend.submit(request)
        except (GenerationError, GlmError) as error:
            for index in job.indexes:
                self._fail(job.line, index, str(error))
            return
        self.open |= {ticket: (job.line, index) for ticket, index in zip(tickets, job.indexes, strict=True)}

    def poll(self) -> None:
        progress = self._backend.poll()
        self._totals.num_tokens += progress.num_new_tokens
        for ended in progress.ended:
            line, index = self.open.pop(ended.ticket)
            if ended.finished is None or ended.finished.finish_reason == "cancelled":
                self._fail(line, index, ended.error or "cancelled")
                continue
            with signals_deferred():
                self._results.add(answer(line, index, ended.finished, ended.logprobs) | self._model)
                self._totals.num_done += 1

    def _fail(self, line: BatchLine, index: int, text: str) -> None:
        with signals_deferred():
            self._results.add(failure(line, index, text) | self._model)
            self._totals.num_failed += 1
            self._totals.num_done += 1


def _drop(backend: BatchBackend) -> None:
    """On the way out: what brought us here is to be told, not that the backend is lost."""
    with contextlib.suppress(CoordinatorError):
        backend.drop()
