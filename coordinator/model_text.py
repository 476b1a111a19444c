"""What a model brings along to be talked to, besides its weights: tokenizer, chat format, generation defaults.

These small files are read before anything is started, so that what is wrong with them is told at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coordinator.conversation import Wanted
from coordinator.prompts import messages_of
from glm.chat_format import ChatFormat, ChatMessage, chat_format_for
from glm.config import ModelConfig
from glm.dialect import find_dialect
from glm.errors import ChatFormatError, NoTokenizerError, TokenizerError
from glm.generation import GenerationDefaults, generation_defaults
from glm.tokenizer import Tokenizer, load_tokenizer
from protocol.client import ChatTurn


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's tokenizer, or why there is none, and its generation defaults.

    `chat_note` and `rotary_note` say how files were understood that several models share, and why; empty where nothing
    could be misunderstood.
    """

    defaults: GenerationDefaults
    found: Tokenizer | None
    complaint: TokenizerError | None
    chat_note: str = ""
    rotary_note: str = ""

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError: the model directory has none, and what that means."""
        if self.found is None:
            assert self.complaint is not None
            raise self.complaint
        return self.found

    def notes(self, wanted: Wanted | None = None) -> tuple[str, ...]:
        """What to tell of it to whoever asks in this way; None: in any."""
        is_chat = wanted in ("chat", None) and self.found is not None
        return tuple(note for note in (self.chat_note if is_chat else "", self.rotary_note) if note)

    def check(self, wanted: Wanted, system: Sequence[ChatTurn] = ()) -> None:
        """Raises TokenizerError or ChatFormatError where that cannot be had, or a system prompt is not taken."""
        if wanted == "token ids":
            return
        tokenizer = self.tokenizer
        if wanted == "chat":
            chat_format = chat_format_for(tokenizer)
            chat_format.encode([ChatMessage("user", "Hello")])
            if system:
                self._check_system(chat_format, system)

    def _check_system(self, chat_format: ChatFormat, system: Sequence[ChatTurn]) -> None:
        try:
            chat_format.encode(messages_of((*system, ChatTurn("user", "", "Hello"))))
        except ChatFormatError as error:
            what = "tools" if any(turn.tools for turn in system) else "system prompt"
            raise ChatFormatError(
                f"this model takes no {what} ({error}): leave it out, or write it into the first question"
            ) from None

    def check_files(self) -> str | None:
        """What to tell of a model without tokenizer files; raises TokenizerError where they are there and broken."""
        if self.complaint is None:
            return None
        if isinstance(self.complaint, NoTokenizerError):
            return f"only token ids can be asked with: {self.complaint}"
        raise self.complaint


def read_model_text(model_dir: Path, config: ModelConfig, chat_format: str | None = None) -> ModelText:
    """Read them; a tokenizer that is missing or broken is no error before it is wanted.

    Raises:
        GlmError: another of these files is unreadable or holds something impossible.
    """
    tokenizer = complaint = None
    chat_note = ""
    try:
        tokenizer = load_tokenizer(model_dir, config, chat_format)
        if config.family == "chatglm2" or chat_format is not None:
            chat_note = find_dialect(config, model_dir, chat_format).note
    except TokenizerError as error:
        complaint = error
    defaults = generation_defaults(config, model_dir, tokenizer)
    return ModelText(defaults, tokenizer, complaint, chat_note, config.rotary_note)
