"""The text side of one request: token ids come in, text that is final goes out, and at the end what it cost."""

import time
from collections.abc import Sequence as AbstractSequence

from coordinator.plan import Plan
from coordinator.sequence import Sequence
from coordinator.timing import StageShare, StepTiming
from glm.answer import AnswerStream
from glm.config import ModelConfig
from glm.decoding import IncrementalDecoder, StopStringMatcher
from glm.logprobs import TokenLogprob
from glm.tokenizer import Tokenizer
from protocol import client
from protocol.client import Delta, Finished, FinishReason, GenerationStats, StageStats
from protocol.limits import NO_CHANCE, clip_text


class Answer:
    """Follows one sequence from its first step to its last.

    `clean` says whether the text gets the family's answer clean-up (chats do, plain continuations do not). Without a
    tokenizer the text stays empty and only token ids are reported.
    """

    def __init__(
        self,
        sequence: Sequence,
        plan: Plan,
        *,
        request_id: int,
        tokenizer: Tokenizer | None,
        config: ModelConfig,
        stop: AbstractSequence[str],
        end_ids: AbstractSequence[int],
        clean: bool,
    ) -> None:
        self.sequence = sequence
        self.request_id = request_id
        self._plan = plan
        self._end_ids = frozenset(end_ids)
        self._decoder = IncrementalDecoder(tokenizer) if tokenizer else None
        self._matcher = StopStringMatcher(stop)
        self._cleaner = AnswerStream(config) if clean else None
        self._text: list[str] = []
        self._num_seen = 0
        self._started_at_s = time.monotonic()
        self._first_token_at_s: float | None = None
        self._shares = [StageShare(0.0, 0.0, 0)] * len(plan.stages)

    @property
    def found_stop_string(self) -> bool:
        """Whether a stop string is complete, so that the sequence should be cancelled."""
        return self._matcher.found is not None

    def follow(self, plan: Plan) -> None:
        """The stages may be others than before, of which nothing is told in the end."""
        if plan is self._plan:
            return
        if plan != self._plan:
            self._shares = [StageShare(0.0, 0.0, 0)] * len(plan.stages)
        self._plan = plan

    def account(self, timing: StepTiming | None) -> None:
        """Add what a step cost."""
        if timing is None or len(timing.stages) != len(self._shares):
            return
        self._shares = [
            StageShare(old.compute_s + new.compute_s, old.wire_s + new.wire_s, new.kv_tokens, new.is_wire_derived)
            for old, new in zip(self._shares, timing.stages, strict=True)
        ]

    def advance(self) -> Delta | None:
        """The text that became final since the last call; None when there are no new ids."""
        start, new_ids = self._num_seen, self.sequence.new_ids
        if self.found_stop_string or start == len(new_ids):
            return None
        if self._first_token_at_s is None:
            self._first_token_at_s = time.monotonic()
        text = ""
        for token_id in new_ids[start:]:
            text += self._show(self._decode(token_id))
            self._num_seen += 1
            if self.found_stop_string:  # of several tokens of one step, those behind it do not count
                break
        logprobs = tuple(map(_to_wire, self.sequence.logprobs[start : self._num_seen]))
        return Delta(self.request_id, text, tuple(new_ids[start : self._num_seen]), logprobs)

    def close(self, pacing: str | None = None) -> tuple[Delta | None, Finished]:
        """What was held back, or came in steps that nobody looked at, if anything; and the whole outcome.

        `pacing`: how its steps shared the chain with others, for the notes of its stats.
        """
        missed = self.advance() or Delta(self.request_id, "", ())
        tail = self._matcher.push(self._decoder.flush()) if self._decoder else ""
        tail += self._matcher.flush()
        if self._cleaner is not None:
            tail = self._cleaner.push(tail) + self._cleaner.flush()
        self._text.append(tail)
        finish_reason: FinishReason = self.sequence.finish_reason or "cancelled"
        finished = Finished(
            self.request_id,
            "stop_string" if self.found_stop_string else finish_reason,
            "".join(self._text),
            tuple(self.sequence.new_ids[: self._num_seen]),
            self._stats(pacing),
        )
        last = Delta(self.request_id, missed.text + tail, missed.token_ids, missed.logprobs)
        return (last if last.text or last.token_ids else None), finished

    def _decode(self, token_id: int) -> str:
        if self._decoder is None or (token_id in self._end_ids and token_id == self.sequence.token_ids[-1]):
            return ""
        return self._decoder.push(token_id)

    def _show(self, text: str) -> str:
        text = self._matcher.push(text)
        if self._cleaner is not None:
            text = self._cleaner.push(text)
        self._text.append(text)
        return text

    def _stats(self, pacing: str | None) -> GenerationStats:
        now_s = time.monotonic()
        first_s = self._first_token_at_s or now_s
        return GenerationStats(
            prompt_tokens=self.sequence.num_prompt,
            prefill_s=first_s - self._started_at_s,
            new_tokens=self._num_seen,
            guarded_tokens=self.sequence.sampler.num_guarded,
            reused_tokens=self.sequence.num_reused,
            drafted_tokens=self.sequence.num_drafted,
            accepted_tokens=self.sequence.num_accepted,
            set_backs=self.sequence.num_set_back,
            notes=tuple(map(clip_text, self._notes(pacing))),
            decode_s=now_s - first_s,
            total_s=now_s - self._started_at_s,
            stages=tuple(
                StageStats(
                    number,
                    self._plan.place(stage.device, stage.host),
                    stage.layers_text,
                    stage.precision,
                    share.compute_s,
                    share.wire_s,
                    share.kv_tokens,
                )
                for number, (stage, share) in enumerate(zip(self._plan.stages, self._shares, strict=True), start=1)
            ),
        )

    def _notes(self, pacing: str | None) -> list[str]:
        """What was done to save time, what it gave, and why other things were not."""
        sequence, notes = self.sequence, []
        if sequence.num_reused:
            notes.append(f"{sequence.num_reused} of {sequence.num_prompt} prompt tokens were cached already")
        if sequence.layout is not None:
            notes.append("prompts are computed whole, nothing is reused: this family's tokens see each other both ways")
        if sequence.num_drafted:
            notes.append(f"{sequence.num_accepted} of {sequence.num_drafted} drafted tokens were right")
        if sequence.num_set_back:
            notes.append(f"computed again for want of KV cache: {sequence.num_set_back} times")
        derived = [str(number) for number, share in enumerate(self._shares, start=1) if share.is_wire_derived]
        if derived:
            notes.append(f"wire of stage {', '.join(derived)}: a share of what the whole way took beyond computing")
        return [*notes, pacing] if pacing else notes


def _to_wire(logprob: TokenLogprob) -> client.TokenLogprob:
    top = tuple(client.TopToken(token_id, max(value, NO_CHANCE)) for token_id, value in logprob.top)
    return client.TokenLogprob(logprob.token_id, max(logprob.logprob, NO_CHANCE), top)
