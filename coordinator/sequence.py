"""One request on its way: its token ids, which are the only truth, and what follows from them."""

from collections.abc import Sequence as AbstractSequence

from coordinator.errors import GenerationError
from glm.positions import PromptLayout
from glm.sampling import Sampler
from protocol.client import FinishReason


class Sequence:
    """A prompt, what was generated so far, and how far the stages have cached it.

    `num_cached` tokens are in the stages' KV caches; the rest of `token_ids` is still to be fed.
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
    ) -> None:
        """`end_ids` is empty to ignore them. `max_length` and `max_context` count prompt and answer together."""
        self.sequence_id = sequence_id
        self.token_ids = list(prompt_ids)
        self.num_prompt = len(prompt_ids)
        self.sampler = sampler
        self.layout = layout
        self.num_cached = 0
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

    def append(self, token_id: int) -> None:
        """Take in a sampled id and decide whether the answer ends with it."""
        self.token_ids.append(token_id)
        num_new = len(self.token_ids) - self.num_prompt
        if token_id in self._end_ids:
            self.finish_reason = "stop"
        elif num_new == self._max_new_tokens:
            self.finish_reason = "length"
        elif len(self.token_ids) >= self._max_context:
            self.finish_reason = "context_full"
        elif self._max_new_tokens is None and len(self.token_ids) >= self._max_length:
            self.finish_reason = "length"
