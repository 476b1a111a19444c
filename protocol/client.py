"""Client plane: a running launch's ROUTER <-> chat and generate programs' DEALER, through `--connect`."""

from typing import Annotated, Literal

from msgspec import Meta

from protocol.limits import (
    MAX_NOTES,
    MAX_STAGES,
    MAX_STOP_STRINGS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    MAX_TURNS,
    Count,
    Id,
    Logprob,
    Name,
    PositiveCount,
    Probability,
    Prompt,
    Seconds,
    Text,
    TokenIds,
    Total,
)
from protocol.records import Record, Variant

NOT_SERVING = "NotServing"
"""The code of an Error that answers whatever is asked of a launch that is still loading; it may be asked again."""
PROMPT_TOO_LONG = "PromptTooLong"
"""The code of an Error about a prompt that leaves no room for an answer; a shorter one may have it."""
FinishReason = Literal["stop", "length", "stop_string", "context_full", "cancelled"]


class SamplingParams(Record, frozen=True):
    """How to choose tokens. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 each switch their rule off."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)]
    top_k: Count
    top_p: Probability
    min_p: Probability
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)]
    seed: Id | None
    stop: Annotated[tuple[Text, ...], Meta(max_length=MAX_STOP_STRINGS)]
    max_new_tokens: PositiveCount | None
    ignore_eos: bool
    greedy: bool


class ChatTurn(Record, frozen=True):
    """One message of a conversation; `metadata` is a tool's name, mostly empty.

    `tools`: descriptions of tools in the system's message, a JSON list of objects as text; empty for none.
    """

    role: Name
    metadata: Name
    content: Prompt
    tools: Prompt = ""


class ChatPrompt(Variant, frozen=True):
    """A conversation, to be put into the model's chat format."""

    turns: Annotated[tuple[ChatTurn, ...], Meta(max_length=MAX_TURNS)]


class TextPrompt(Variant, frozen=True):
    """Plain text, to be tokenized as the family's published tokenizer does.

    `special_tokens`: names of special tokens in the text become these tokens, as far as the tokenizer knows them so.
    """

    text: Prompt
    special_tokens: bool = False


class TokenPrompt(Variant, frozen=True):
    """Token ids, taken as they are."""

    token_ids: TokenIds


class Generate(Record, frozen=True):
    """Client -> launch. Answered by any number of Queued and Delta and one Finished, or by Error.

    `sampling` None: the launch's defaults. `num_logprobs`: of how many of the likeliest tokens to report the
    log-probability beside each new token's; None reports nothing.
    """

    request_id: Id
    prompt: ChatPrompt | TextPrompt | TokenPrompt
    sampling: SamplingParams | None
    num_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class TopToken(Record, frozen=True):
    """One of the likeliest tokens in some place, with its natural log-probability."""

    token_id: Count
    logprob: Logprob


class TokenLogprob(Record, frozen=True):
    """A token's natural log-probability before temperature and every other rule, and the likeliest ones, best first."""

    token_id: Count
    logprob: Logprob
    top: Annotated[tuple[TopToken, ...], Meta(max_length=MAX_TOP_LOGPROBS)]


class Queued(Record, frozen=True):
    """The request waits for room in the KV caches (or for a free place); `position` 1 is next.

    A long queue is told of its places in turns: a position may be some steps old.

    `waits_for`: what keeps the launch from serving anybody, in words, such as a worker that was lost; None otherwise.
    """

    request_id: Id
    position: PositiveCount
    waits_for: Text | None


class Delta(Record, frozen=True):
    """The next piece of an answer; `logprobs`, one for each token id, only where they were asked for."""

    request_id: Id
    text: Prompt
    token_ids: TokenIds
    logprobs: Annotated[tuple[TokenLogprob, ...], Meta(max_length=MAX_TOKENS)] = ()


class StageStats(Record, frozen=True):
    """One stage's share of an answer, as users read it: stages count from 1, `layers` are 1-based inclusive, `1-12`."""

    stage_number: PositiveCount
    device: Name
    layers: Name
    precision: Name
    compute_s: Seconds
    wire_s: Seconds
    kv_tokens: Total


class GenerationStats(Record, frozen=True):
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
    stages: Annotated[tuple[StageStats, ...], Meta(max_length=MAX_STAGES)]
    notes: Annotated[tuple[Text, ...], Meta(max_length=MAX_NOTES)]


class Finished(Record, frozen=True):
    """The answer is complete: all of its text and token ids."""

    request_id: Id
    finish_reason: FinishReason
    text: Prompt
    token_ids: TokenIds
    stats: GenerationStats


class Error(Record, frozen=True):
    """The request failed; the launch goes on."""

    request_id: Id
    code: Name
    text: Text


class Cancel(Record, frozen=True):
    """Client -> launch: stop the answer with this request_id; Finished (`cancelled`) follows."""

    request_id: Id


class Describe(Record, frozen=True):
    """Client -> launch: what runs there? Also serves as the client's ping."""

    request_id: Id


class Description(Record, frozen=True):
    """Answer to Describe. `waits_for`: what keeps the launch from serving, and since when; None while it serves.

    `fingerprint` tells models apart by their files, `precision` says at which each part is held, `chat_format` how
    conversations are written (empty where there is no tokenizer): what answers depend on, besides what was asked.
    """

    request_id: Id
    model_name: Name
    family: Name
    max_context: PositiveCount
    plan_lines: Annotated[tuple[Text, ...], Meta(max_length=MAX_STAGES + 64)]
    defaults: SamplingParams
    waits_for: Text | None
    fingerprint: Name = ""
    precision: Text = ""
    chat_format: Name = ""


ClientMessage = Generate | Queued | Delta | Finished | Error | Cancel | Describe | Description
