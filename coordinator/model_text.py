"""What a model brings along to be talked to, besides its weights: tokenizer, chat format, generation defaults.

These small files are read before anything is started, so that what is wrong with them is told at once.
"""

from dataclasses import dataclass
from pathlib import Path

from coordinator.conversation import Wanted
from glm.chat_format import ChatMessage, chat_format_for
from glm.config import ModelConfig
from glm.errors import NoTokenizerError, TokenizerError
from glm.generation import GenerationDefaults, generation_defaults
from glm.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's tokenizer, or why there is none, and its generation defaults."""

    defaults: GenerationDefaults
    found: Tokenizer | None
    complaint: TokenizerError | None

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError: the model directory has none, and what that means."""
        if self.found is None:
            assert self.complaint is not None
            raise self.complaint
        return self.found

    def check(self, wanted: Wanted) -> None:
        """Raises TokenizerError or ChatFormatError where that cannot be had."""
        if wanted == "token ids":
            return
        tokenizer = self.tokenizer
        if wanted == "chat":
            chat_format_for(tokenizer).encode([ChatMessage("user", "Hello")])

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
    try:
        tokenizer = load_tokenizer(model_dir, config, chat_format)
    except TokenizerError as error:
        complaint = error
    return ModelText(generation_defaults(config, model_dir, tokenizer), tokenizer, complaint)
