"""What a model is told before everything else: `--system TEXT|@FILE`, and `/system` in a chat."""

from pathlib import Path

from coordinator.errors import UsageError
from coordinator.input_files import MOST_PROMPT_BYTES, decoded, read_input
from protocol.limits import MAX_PROMPT


def read_system(text: str) -> str:
    """The system prompt that `text` means: itself, or what is in FILE where it is `@FILE` (`@@` for a text with one @).

    Raises:
        UsageError: the file cannot be read or is not UTF-8, or there is nothing in it, or too much.
    """
    if text.startswith("@@") or not text.startswith("@"):
        return _checked(text.removeprefix("@") if text.startswith("@@") else text, "the system prompt")
    path = Path(text[1:])
    try:
        content = decoded(read_input(path.expanduser(), "the system prompt", MOST_PROMPT_BYTES))
    except UnicodeDecodeError as error:
        raise UsageError(f"the system prompt {path} is not UTF-8 text (byte {error.start}); convert it") from None
    except UsageError as error:
        raise UsageError(f"{error}; @@ begins a text with an @") from None
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the system prompt {path} cannot be read: {error}; @@ begins a text with an @") from None
    return _checked(content.removesuffix("\n"), f"the system prompt {path}")


def _checked(text: str, what: str) -> str:
    if not text.strip():
        raise UsageError(f"{what} is empty; write something, or leave it out")
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{what} has {len(text)} characters; {MAX_PROMPT} are the most")
    return text
