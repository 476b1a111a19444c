"""Answers to a file of prompts on standard output: a line each, as in a file of results, but nothing is found again."""

import json
from collections.abc import Mapping
from typing import Any, Protocol, Self, TextIO

from coordinator.batch_prompts import BatchLine
from coordinator.closing import Closing
from coordinator.model_identity import ModelIdentity
from glm.printable import printable_json


class Results(Protocol):
    """Where answers go, and which of them are there already."""

    num_cut_bytes: int
    """Of a torn line that was there."""

    def missing(self, line: BatchLine) -> tuple[int, ...]:
        """Which of a prompt's answers are not there. Raises ResultFileError when those there are of another prompt."""
        ...

    def refuse_strangers(self) -> None:
        """Raises ResultFileError where an answer is to a prompt that `missing` was not asked about."""
        ...

    def refuse_other_models(self, model: ModelIdentity) -> None:
        """Raises ResultFileError where an answer is of another model, of another precision, or another chat format."""
        ...

    def add(self, result: Mapping[str, Any]) -> None:
        """Append a line. Raises ResultsError."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ResultStream(Closing):
    """Nothing is there, all is missing, every line is out at once. The stream is not closed."""

    num_cut_bytes = 0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def missing(self, line: BatchLine) -> tuple[int, ...]:
        return tuple(range(line.num_answers))

    def refuse_strangers(self) -> None:
        """There are none."""

    def refuse_other_models(self, model: ModelIdentity) -> None:
        """There are none."""

    def add(self, result: Mapping[str, Any]) -> None:
        """Raises what the stream raises: BrokenPipeError where nobody reads any more."""
        self._stream.write(printable_json(json.dumps(result, ensure_ascii=False, allow_nan=False)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        pass
