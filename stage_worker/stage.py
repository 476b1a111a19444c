"""`Stage`: a range of layers and the sequences cached in it. No sockets: a step and its hidden states in, out."""

from collections.abc import Callable, Sequence

import torch

from glm.attention import Segment
from glm.errors import GlmError
from glm.model import LayerObserver, LayerStack
from glm.positions import PromptLayout
from protocol.control import InspectedPart
from protocol.data import DropSequence, ForkSequence, KvUpdate, Span, Step, TruncateSequence
from protocol.errors import ProtocolError
from stage_worker.errors import AbandonedError, InspectError, StepError
from stage_worker.memory import is_out_of_memory
from stage_worker.sequence import StageSequence


class Stage:
    """What one assignment makes of a worker. The rules of a step are those of protocol/README.md, data plane."""

    def __init__(self, layers: LayerStack, kv_budget_tokens: int, record_hidden_states: bool = False) -> None:
        self.layers = layers
        self.kv_budget_tokens = kv_budget_tokens
        self.record_hidden_states = record_hidden_states
        self._device = layers.placement.device
        self._sequences: dict[int, StageSequence] = {}

    @property
    def kv_tokens(self) -> int:
        """Tokens cached in all sequences together."""
        return sum([sequence.cache.length for sequence in self._sequences.values()])

    @property
    def num_sequences(self) -> int:
        """Sequences held."""
        return len(self._sequences)

    def run(self, step: Step, hidden: torch.Tensor, abandoned: Callable[[], bool] = lambda: False) -> torch.Tensor:
        """Apply the updates, then take the spans' hidden states [num_tokens, hidden_size] through the layers.

        `abandoned` is asked before every layer whether to give up.

        Raises:
            StepError: no sequence has grown; those of the spans may be left truncated to their start_pos.
            AbandonedError: `abandoned` said so; the same holds.
        """
        if step.updates:
            self.apply(step.updates)
        segments, sequences = self._open_spans(step.spans, hidden)
        outputs: list[torch.Tensor] = []

        def go_on() -> None:
            if abandoned():
                raise AbandonedError(f"step {step.step_id}")

        hidden = self._forward(hidden, segments, _recorder(outputs) if self.record_hidden_states else None, go_on)
        self._sequences |= sequences
        if outputs:
            chunks = torch.stack(outputs).split([span.num_tokens for span in step.spans], dim=1)
            for sequence, chunk in zip(sequences.values(), chunks, strict=True):
                sequence.record(chunk.clone())
        return hidden

    def apply(self, updates: Sequence[KvUpdate]) -> None:
        """Apply all updates in order; a faulty one does not keep the others from being applied.

        Raises:
            StepError: the first fault, after all updates were tried.
        """
        faults = []
        for update in updates:
            try:
                self._apply_one(update)
            except StepError as failure:
                faults.append(failure)
        if faults:
            raise faults[0]

    def inspect(self, sequence_id: int, layer: int, what: InspectedPart) -> torch.Tensor:
        """As it is held, a view: hidden [tokens, hidden_size], key and value [tokens, num_kv_heads, head_dim].

        Raises:
            InspectError: the layer, the sequence or the recording is not here.
        """
        start, end = self.layers.start, self.layers.end
        if not start <= layer < end:
            raise InspectError(f"layer {layer + 1} is not here: this stage has layers {start + 1}-{end}")
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise InspectError(f"sequence {sequence_id} is not cached here")
        if what == "hidden":
            recorded = sequence.recorded()
            if recorded is None:
                raise InspectError("hidden states are not recorded: the assignment did not ask for it")
            return recorded[layer - start]
        return sequence.cache.key(layer - start) if what == "key" else sequence.cache.value(layer - start)

    def _apply_one(self, update: KvUpdate) -> None:
        match update:
            case DropSequence(sequence_id):
                self._sequences.pop(sequence_id, None)
            case TruncateSequence(sequence_id, length):
                if sequence_id in self._sequences or length > 0:
                    self._held(sequence_id, length).truncate(length)
            case ForkSequence(source_id, new_id, length):
                source = self._held(source_id, length)
                replaced = self._sequences.get(new_id)
                self._check_budget(length - (replaced.length if replaced else 0))
                try:
                    self._sequences[new_id] = source.fork(length)
                except Exception as error:
                    raise self.step_error(error) from None

    def _held(self, sequence_id: int, length: int) -> StageSequence:
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            raise StepError("unknown_sequence", f"sequence {sequence_id} is not cached here")
        if length > sequence.length:
            raise StepError(
                "cache_gap", f"sequence {sequence_id} has {sequence.length} tokens cached, {length} are wanted"
            )
        return sequence

    def _open_spans(
        self, spans: Sequence[Span], hidden: torch.Tensor
    ) -> tuple[list[Segment], dict[int, StageSequence]]:
        """Check all spans, then truncate their sequences to where they start. New sequences are not yet kept."""
        config = self.layers.config
        if hidden.shape[1] != (size := config.hidden_size):
            raise StepError("bad_step", f"hidden states are {hidden.shape[1]} wide, this model's are {size}")
        is_prefix_lm, growth = config.is_prefix_lm, 0
        opened: list[tuple[Span, PromptLayout | None, StageSequence | None]] = []
        for span in spans:
            sequence = self._sequences.get(span.sequence_id)
            length = 0 if sequence is None else sequence.cache.length
            if span.start_pos > length:
                raise StepError(
                    "cache_gap",
                    f"sequence {span.sequence_id} goes on at position {span.start_pos}, {length} tokens are cached",
                )
            growth += span.start_pos + span.num_tokens - length
            opened.append((span, _layout(span, is_prefix_lm), sequence))
        self._check_budget(growth)
        sequences, segments = {}, []
        for span, layout, held in opened:
            sequence = held or StageSequence(self.layers.new_cache())
            if sequence.cache.length != span.start_pos:
                sequence.truncate(span.start_pos)
            sequences[span.sequence_id] = sequence
            segments.append(Segment(sequence.cache, span.start_pos, span.num_tokens, layout))
        return segments, sequences

    def _check_budget(self, growth: int) -> None:
        if growth > 0 and (held := self.kv_tokens) + growth > self.kv_budget_tokens:
            raise StepError(
                "kv_budget",
                f"{growth} more tokens do not fit: {held} of this stage's KV budget of {self.kv_budget_tokens} tokens "
                "are taken; shorten the conversation, end others, or raise the budget",
            )

    def _forward(
        self,
        hidden: torch.Tensor,
        segments: list[Segment],
        observe: LayerObserver | None,
        go_on: Callable[[], None],
    ) -> torch.Tensor:
        if not segments:
            return hidden.to(self._device, self.layers.placement.dtype)
        try:
            return self.layers.forward(hidden, segments, observe, go_on)
        except AbandonedError:
            raise
        except Exception as error:  # whatever a step ran into fails that step alone
            raise self.step_error(error) from None

    def step_error(self, error: Exception) -> StepError:
        """Whatever went wrong during a step, as what the coordinator is told."""
        if isinstance(error, StepError):
            return error
        if is_out_of_memory(error):
            return StepError(
                "out_of_memory",
                f"{self._device} has no memory left for this step, {self.kv_tokens} KV tokens are held; "
                "give this stage fewer layers, a lower precision or a smaller KV budget",
            )
        if isinstance(error, GlmError | ProtocolError):
            return StepError("bad_step", str(error))
        return StepError("internal", f"{type(error).__name__}: {error}")


def _recorder(outputs: list[torch.Tensor]) -> LayerObserver:
    def observe(_layer: int, output: torch.Tensor) -> None:
        outputs.append(output.to("cpu", torch.float32, copy=True))

    return observe


def _layout(span: Span, is_prefix_lm: bool) -> PromptLayout | None:
    """The prompt layout a span states, which must suit the model."""
    if span.context_length is None:
        if is_prefix_lm:
            raise StepError("bad_step", f"sequence {span.sequence_id}: a prefix LM needs the prompt's layout")
        return None
    if not is_prefix_lm:
        raise StepError("bad_step", f"sequence {span.sequence_id}: a causal model has no prompt layout")
    return PromptLayout(span.context_length, span.mask_position)
