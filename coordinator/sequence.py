"""One request on its way: its token ids, which are the only truth, and what follows from them."""

from collections.abc import Iterator
from collections.abc import Sequence as AbstractSequence
from contextlib import contextmanager

from coordinator.errors import GenerationError
from glm.errors import GlmError, faults_as
from glm.logprobs import TokenLogprob
from glm.positions import PromptLayout
from glm.sampling import Sampler
from glm.speculation import DraftLength, PromptLookup
from protocol.client import FinishReason


class Sequence:
    """A prompt, what was generated so far, and how far the stages have it in their caches.

    Of `token_ids`, the first `num_cached` came back from the last stage, the first `num_sent` are on their way or
    there; the rest is still to be fed. The stages hold up to `num_held` tokens: drafts that failed are among them
    until the next step of this sequence truncates them.
    """

    def __init__(
        self,
        sequence_id: int,
        prompt_ids: AbstractSequence[int],
        sampler: Sampler,
        *,
        layout: PromptLayout | None,
        end_ids: frozenset[int],
        max_new_tokens: int | None,
        max_length: int,
        max_context: int,
        num_logprobs: int | None = None,
        wants_prompt_logprobs: bool = False,
        leader: "Sequence | None" = None,
    ) -> None:
        """`end_ids` is empty to ignore them. `max_length` and `max_context` count prompt and answer together.

        With `max_new_tokens` 0 the prompt is fed and nothing is sampled. `num_logprobs`: of how many of the likeliest
        tokens to note the log-probability beside each chosen token's; None notes nothing. `leader` has the same
        prompt: this one waits until the leader's is cached, and forks it.
        """
        self.sequence_id = sequence_id
        self.kv_id = sequence_id
        """What the stages call it: another one's id where it goes on from what that one left there."""
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.sampler = sampler
        self.layout = layout
        self.leader = leader
        self.num_cached = self.num_sent = self.num_held = 0
        self.num_steps_in_flight = 0
        self.last_step_id = 0
        self.num_reused = 0
        self.num_set_back = 0
        self.num_drafted = self.num_accepted = 0
        self.drafter: PromptLookup | None = None
        self.draft_length = DraftLength()
        self.num_logprobs = num_logprobs
        self.logprobs: list[TokenLogprob] = []
        self.wants_prompt_logprobs = wants_prompt_logprobs
        self.prompt_logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.error: GenerationError | None = None
        self._end_ids = end_ids
        self._max_new_tokens = max_new_tokens
        self._max_length = max_length
        self._max_context = max_context

    @property
    def new_ids(self) -> list[int]:
        """The token ids generated so far."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will be generated, for better or worse."""
        return self.finish_reason is not None or self.error is not None

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens are still to be fed before the next one can be sampled, on top of the last one."""
        return self.num_sent < len(self.token_ids) - 1 or (self.num_sent == 0 and not self.is_finished)

    @property
    def num_reserved(self) -> int:
        """Tokens of KV cache that count as taken: a prompt as soon as its first part is fed."""
        return max(self.num_held, len(self.token_ids)) if self.is_prefilling else self.num_held

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in this block is this sequence's error and nobody else's; `what` says what failed."""
        try:
            with faults_as(GenerationError, what):
                yield
        except (GenerationError, GlmError) as error:
            self.error = error if isinstance(error, GenerationError) else GenerationError(str(error))

    def finish_prompt(self) -> None:
        """The whole prompt is cached; ends here when nothing is to be sampled."""
        if self._max_new_tokens == 0:
            self.finish_reason = "length"

    def append(self, token_id: int) -> None:
        """Take in a sampled id and decide whether the answer ends with it."""
        self.token_ids.append(token_id)
        if self.drafter is not None:
            self.drafter.extend((token_id,))
        num_new = len(self.token_ids) - self.num_prompt
        if token_id in self._end_ids:
            self.finish_reason = "stop"
        elif num_new == self._max_new_tokens:
            self.finish_reason = "length"
        elif len(self.token_ids) >= self._max_context:
            self.finish_reason = "context_full"
        elif self._max_new_tokens is None and len(self.token_ids) >= self._max_length:
            self.finish_reason = "length"

    @property
    def most_growth(self) -> int:
        """So many tokens can still come."""
        end = self._max_context
        if self._max_new_tokens is not None:
            end = min(end, self.num_prompt + self._max_new_tokens)
        return max(0, end - len(self.token_ids))

    def start_over(self) -> None:
        """The stages have forgotten it: everything is to be fed again."""
        self.num_cached = self.num_sent = self.num_held = self.num_steps_in_flight = 0
        self.kv_id = self.sequence_id
        self.prompt_logprobs.clear()
