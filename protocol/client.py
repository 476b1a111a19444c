"""Client plane: a running launch's ROUTER <-> chat and generate programs' DEALER, through `--connect`."""

from dataclasses import dataclass
from typing import Annotated, Literal

from protocol.limits import (
    MAX_NOTES,
    MAX_STAGES,
    MAX_STOP_STRINGS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    MAX_TURNS,
    Count,
    FloatRange,
    Id,
    IntRange,
    Logprob,
    MaxLength,
    Name,
    PositiveCount,
    Probability,
    Prompt,
    Seconds,
    Text,
    TokenIds,
    Total,
)

FinishReason = Literal["stop", "length", "stop_string", "context_full", "cancelled"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 each switch their rule off."""

    temperature: Annotated[float, FloatRange(0.0, 100.0)]
    top_k: Count
    top_p: Probability
    min_p: Probability
    repetition_penalty: Annotated[float, FloatRange(0.01, 100.0)]
    seed: Id | None
    stop: Annotated[tuple[Text, ...], MaxLength(MAX_STOP_STRINGS)]
    max_new_tokens: PositiveCount | None
    ignore_eos: bool
    greedy: bool


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation; `metadata` is a tool's name, mostly empty."""

    role: Name
    metadata: Name
    content: Prompt


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, to be put into the model's chat format."""

    turns: Annotated[tuple[ChatTurn, ...], MaxLength(MAX_TURNS)]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text, to be tokenized as the family's published tokenizer does."""

    text: Prompt


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: TokenIds


@dataclass(frozen=True, slots=True)
class Generate:
    """Client -> launch. Answered by any number of Queued and Delta and one Finished, or by Error.

    `sampling` None: the launch's defaults. `num_logprobs`: of how many of the likeliest tokens to report the
    log-probability beside each new token's; None reports nothing.
    """

    request_id: Id
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    sampling: SamplingParams | None
    num_logprobs: Annotated[int, IntRange(0, MAX_TOP_LOGPROBS)] | None = None


@dataclass(frozen=True, slots=True)
class TopToken:
    """One of the likeliest tokens in some place, with its natural log-probability."""

    token_id: Count
    logprob: Logprob


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural log-probability before temperature and every other rule, and the likeliest ones, best first."""

    token_id: Count
    logprob: Logprob
    top: Annotated[tuple[TopToken, ...], MaxLength(MAX_TOP_LOGPROBS)]


@dataclass(frozen=True, slots=True)
class Queued:
    """The request waits for room in the KV caches (or for a free place); `position` 1 is next."""

    request_id: Id
    position: PositiveCount


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of an answer; `logprobs`, one for each token id, only where they were asked for."""

    request_id: Id
    text: Prompt
    token_ids: TokenIds
    logprobs: Annotated[tuple[TokenLogprob, ...], MaxLength(MAX_TOKENS)] = ()


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage's share of an answer, as users read it: stages count from 1, `layers` are 1-based inclusive, `1-12`."""

    stage_number: PositiveCount
    device: Name
    layers: Name
    precision: Name
    compute_s: Seconds
    wire_s: Seconds
    kv_tokens: Total


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What an answer cost.

    Each of `guarded_tokens` stands in for one that could not be chosen, as scores were NaN or infinite.
    `reused_tokens` of the prompt were cached already. Of `drafted_tokens`, guessed and then verified, `accepted_tokens`
    were right. `set_backs` is how often the stages had to forget and compute again what they had of it, for want of
    room. `notes` are for people: what was chosen for this answer's steps, and why.
    """

    prompt_tokens: Count
    prefill_s: Seconds
    new_tokens: Count
    guarded_tokens: Count
    reused_tokens: Count
    drafted_tokens: Count
    accepted_tokens: Count
    set_backs: Count
    decode_s: Seconds
    total_s: Seconds
    stages: Annotated[tuple[StageStats, ...], MaxLength(MAX_STAGES)]
    notes: Annotated[tuple[Text, ...], MaxLength(MAX_NOTES)]


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete: all of its text and token ids."""

    request_id: Id
    finish_reason: FinishReason
    text: Prompt
    token_ids: TokenIds
    stats: GenerationStats


@dataclass(frozen=True, slots=True)
class Error:
    """The request failed; the launch goes on."""

    request_id: Id
    code: Name
    text: Text


@dataclass(frozen=True, slots=True)
class Cancel:
    """Client -> launch: stop the answer with this request_id; Finished (`cancelled`) follows."""

    request_id: Id


@dataclass(frozen=True, slots=True)
class Describe:
    """Client -> launch: what runs there? Also serves as the client's ping."""

    request_id: Id


@dataclass(frozen=True, slots=True)
class Description:
    """Answer to Describe."""

    request_id: Id
    model_name: Name
    family: Name
    max_context: PositiveCount
    plan_lines: Annotated[tuple[Text, ...], MaxLength(MAX_STAGES + 64)]
    defaults: SamplingParams


ClientMessage = Generate | Queued | Delta | Finished | Error | Cancel | Describe | Description
