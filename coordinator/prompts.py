"""What clients ask for, as the network understands it: prompts as token ids, sampling params, and the room there is."""

from collections.abc import Callable
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import cast

from coordinator.errors import GenerationError, PromptTooLong
from coordinator.scheduler import SchedulerSettings
from coordinator.tools import tools_of
from glm.chat_format import ChatMessage, Role, chat_format_for
from glm.config import ModelConfig
from glm.errors import faults_as
from glm.sampling import Sampler
from glm.sampling_params import SamplingParams
from glm.speculation import PromptLookup
from glm.tokenizer import Tokenizer
from protocol import client

Prompt = client.ChatPrompt | client.TextPrompt | client.TokenPrompt


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A request as the engine takes it, before it has a place in the queue."""

    token_ids: list[int]
    params: SamplingParams
    sampler: Sampler
    drafter: PromptLookup | None
    is_chat: bool


LONG_PROMPT = 4096
"""Token ids that are looked at in passing; more take milliseconds, as any text may."""


def takes_long(prompt: Prompt) -> bool:
    """Whether nobody should wait while this becomes token ids, for a tokenizer or a template has to work on it."""
    return not isinstance(prompt, client.TokenPrompt) or len(prompt.token_ids) > LONG_PROMPT


def prompt_ids(prompt: Prompt, tokenizer: Callable[[], Tokenizer]) -> list[int]:
    """The token ids a prompt becomes; `tokenizer` is asked for only where there is text.

    Raises:
        TokenizerError, ChatFormatError: the model cannot be asked so. GenerationError: nobody knows why it failed.
    """
    if isinstance(prompt, client.TokenPrompt):
        return list(prompt.token_ids)
    with faults_as(GenerationError, "the prompt could not be turned into token ids"):
        if isinstance(prompt, client.TextPrompt):
            return tokenizer().encode_prompt(prompt.text, allow_special=prompt.special_tokens)
        return chat_format_for(tokenizer()).encode(messages_of(prompt.turns))


def messages_of(turns: AbstractSequence[client.ChatTurn]) -> list[ChatMessage]:
    """The turns as a chat format takes them. Raises GenerationError for tools that are none."""
    return [ChatMessage(cast(Role, turn.role), turn.content, turn.metadata, tools_of(turn.tools)) for turn in turns]


def max_model_len(config: ModelConfig, settings: SchedulerSettings) -> int:
    """Prompt and answer together, at most: the model's context, what the plan says, the tightest KV budget.

    What a prefix LM computes again, it computes in one step, which one message must carry.
    """
    whole = settings.max_step_tokens if config.is_prefix_lm else config.max_context
    return min(config.max_context, settings.max_model_len or config.max_context, settings.kv_budget_tokens, whole)


def check_prompt(token_ids: AbstractSequence[int], config: ModelConfig, settings: SchedulerSettings) -> None:
    """Raises PromptTooLong where there are too many tokens, GenerationError for none or such as the model lacks."""
    if not token_ids:
        raise GenerationError("the prompt has no tokens: give at least one")
    if len(token_ids) >= config.max_context:
        raise PromptTooLong(
            f"the conversation has {len(token_ids)} tokens, the model's context holds {config.max_context}: "
            "shorten it or start a new one"
        )
    most = max_model_len(config, settings)
    if len(token_ids) >= most:
        limits = {
            settings.max_model_len: "max_model_len",
            settings.kv_budget_tokens: "the KV budget of the tightest stage",
        }
        limit = limits.get(most, "one step, in which a prefix LM's conversation is computed,")
        raise PromptTooLong(
            f"the conversation has {len(token_ids)} tokens, {limit} allows {most} together with the answer: "
            "shorten it, or raise that limit"
        )
    wrong = [i for i in token_ids if not 0 <= i < config.vocab_size]
    if wrong:
        raise GenerationError(f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size}")


def to_wire(params: SamplingParams) -> client.SamplingParams:
    """As clients send it."""
    return client.SamplingParams(**{name: getattr(params, name) for name in client.SamplingParams.__struct_fields__})


def from_wire(params: client.SamplingParams) -> SamplingParams:
    """As the sampler takes it. Raises SamplingError for impossible values."""
    return SamplingParams(**{name: getattr(params, name) for name in client.SamplingParams.__struct_fields__})
