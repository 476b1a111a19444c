"""A file of results, one JSON object a line: what is in it already, and adding to it so that a kill at any moment
leaves whole lines and at most one torn one, which the next run cuts."""

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from coordinator.batch_prompts import BatchLine, Key
from coordinator.closing import Closing
from coordinator.errors import ResultFileError, ResultsError
from coordinator.model_identity import ModelIdentity
from coordinator.report import cut_note
from glm.logprobs import TokenLogprob
from protocol.client import Finished

_BEGINNING = b'{"id": '
"""Of every line, so that a torn one can be told from something else."""
_PIECE_BYTES = 2**16


@dataclass(slots=True)
class Answered:
    """What a file has for one prompt: bit i of `indexes` is set where answer i is there."""

    digest: str
    result_line: int
    indexes: int = 0
    is_asked_for: bool = False


NOT_SAID = ModelIdentity("", "", "", "")


class ResultFile(Closing):
    """An open file of results, and what was in it when it was opened. A context manager; no two at once.

    One that did not exist and got nothing written is gone again when it is closed.

    Raises, when made:
        ResultFileError: it is something else than a file of results, or another run has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answered: dict[Key, Answered] = {}
        self._models: dict[ModelIdentity, int] = {}
        self.num_cut_bytes = 0
        self._is_new = not path.exists()
        self._file = _opened(path)
        try:
            for number, data in _whole_lines(path):
                self._take_in(number, data)
            self._cut_torn_line()
        except BaseException:
            self.close()
            raise

    def missing(self, line: BatchLine) -> tuple[int, ...]:
        """Which of a prompt's answers are not there. Raises ResultFileError when those there are of another prompt."""
        there = self.answered.get(line.key)
        if there is None:
            return tuple(range(line.num_answers))
        there.is_asked_for = True
        if there.digest != line.digest:
            raise ResultFileError(
                f"{self.path}, line {there.result_line}: the answer is not to line {line.number} of these prompts as "
                "they are now (another prompt, or other sampling options): name another file with --out"
            )
        return tuple(index for index in range(line.num_answers) if not there.indexes >> index & 1)

    def refuse_strangers(self) -> None:
        """Raises ResultFileError where an answer is to a prompt that `missing` was not asked about."""
        for (kind, value), there in self.answered.items():
            if not there.is_asked_for:
                raise ResultFileError(
                    f"{self.path}, line {there.result_line}: it answers the prompt with {kind} {value!r}, which is not "
                    "among these prompts: name another file with --out"
                )

    def refuse_other_models(self, model: ModelIdentity) -> None:
        """Raises ResultFileError where an answer is of another model, of another precision, or another chat format."""
        for other, number in self._models.items():
            differences = "; ".join(model.differences(other))
            if differences:
                whose = f"the answer is that of {other.name}, and now another would answer ({differences})"
                said = "it does not say which model answered" if other == NOT_SAID else whose
                raise ResultFileError(f"{self.path}, line {number}: {said}: name another file with --out")

    def add(self, result: Mapping[str, Any]) -> None:
        """Append a line, with one call that reaches the system before this returns. Raises ResultsError."""
        data = (json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n").encode()
        try:
            while data:  # once, unless the disk is full or a signal came
                data = data[self._file.write(data) :]
        except OSError as error:
            raise ResultsError(
                f"{self.path} cannot be written ({error.strerror}): make room, then the same command goes on from here"
            ) from error

    def close(self) -> None:
        """Let others write it. Safe to call twice."""
        if self._is_new and not self._file.closed and os.fstat(self._file.fileno()).st_size == 0:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _take_in(self, number: int, data: bytes) -> None:
        try:
            found = json.loads(data)
            key: Key = ("line", found["line"]) if found["id"] is None else ("id", found["id"])
            digest, index, failed = found["prompt_digest"], found["index"], "error" in found
            sound = isinstance(digest, str) and type(index) is int and 0 <= index < 2**16
            sound = sound and type(key[1]) in (str, int)
            model = NOT_SAID if "model" not in found else ModelIdentity(**found["model"])
            self._models |= {} if failed or not sound else {model: self._models.get(model, number)}
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ResultFileError(
                f"{self.path}, line {number}: not a line that this command writes: name another file with --out"
            )
        there = self.answered.setdefault(key, Answered(digest, number))
        if there.digest != digest:
            raise ResultFileError(
                f"{self.path}, lines {there.result_line} and {number}: answers to two prompts with the same "
                f"{key[0]}: name another file with --out"
            )
        if not failed:
            there.indexes |= 1 << index

    def _cut_torn_line(self) -> None:
        """A run that was killed may have left part of a line."""
        end = self._file.seek(0, os.SEEK_END)
        whole = _end_of_whole_lines(self._file, end)
        if whole == end:
            return
        self._file.seek(whole)
        torn = self._file.read(len(_BEGINNING)).rstrip(b"\0")
        if not _BEGINNING.startswith(torn):
            raise ResultFileError(f"{self.path}: its last line is none that this command writes: name another --out")
        self.num_cut_bytes = end - whole
        self._file.truncate(whole)


def answer(
    line: BatchLine, index: int, finished: Finished, logprobs: AbstractSequence[TokenLogprob] | None = None
) -> dict[str, Any]:
    """The line of an answer."""
    return {
        **_head(line, index),
        "text": finished.text,
        "token_ids": list(finished.token_ids),
        "finish_reason": finished.finish_reason,
        **({"note": note} if (note := cut_note(finished, line.sampling.get("max_new_tokens"))) else {}),
        "prompt_tokens": finished.stats.prompt_tokens,
        "new_tokens": finished.stats.new_tokens,
        **({} if logprobs is None else {"logprobs": logprobs_as_json(logprobs)}),
        "prompt_digest": line.digest,
    }


def logprobs_as_json(logprobs: AbstractSequence[TokenLogprob]) -> list[dict[str, Any]]:
    """An object for each token; minus infinity, which JSON does not know, becomes null."""
    return [
        {
            "token_id": each.token_id,
            "logprob": _number(each.logprob),
            "top": [[token_id, _number(logprob)] for token_id, logprob in each.top],
        }
        for each in logprobs
    ]


def _number(logprob: float) -> float | None:
    return logprob if math.isfinite(logprob) else None


def failure(line: BatchLine, index: int, text: str) -> dict[str, Any]:
    """The line of a request that failed by itself; a later run tries it again."""
    return {**_head(line, index), "error": text, "prompt_digest": line.digest}


def _head(line: BatchLine, index: int) -> dict[str, Any]:
    return {"id": line.id, "line": line.number, "index": index}


def _opened(path: Path) -> FileIO:
    if path.is_dir():
        raise ResultFileError(f"--out {path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise ResultFileError(f"--out {path} is a device or a socket, which cannot be read again; name a file")
    try:
        file = FileIO(path, "a+")
    except OSError as error:
        raise ResultFileError(f"--out {path} cannot be opened: {error.strerror}; choose another place") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ResultFileError(f"--out {path}: another run is writing it; wait for it, or name another file") from None
    except OSError:
        pass  # a file system without locks
    return file


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as reader:
        for number, data in enumerate(reader, start=1):
            if data.endswith(b"\n"):
                yield number, data


def _end_of_whole_lines(file: FileIO, end: int) -> int:
    """The position after the last newline."""
    while end > 0:
        start = max(0, end - _PIECE_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
