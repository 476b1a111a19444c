"""Fetches a hub's model by `hub_program.py`, with deadlines: says whom it asks and how far it is, and ends at once."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from glm.errors import HubError, ModelNotFoundError
from glm.signals import undone_at_signals

Tell = Callable[[str], None]
"""Receives a line for people."""

START_S = 60.0
"""Python and the hub's library take seconds to start, more on a slow disk."""
GRACE_S = 5.0
"""For an answer that comes in time by the library's own clock."""
SILENCE_S = 180.0
"""The library itself tries again for a minute or two before it gives up a file."""
_EVERY_S = 10.0
_PROGRAM = Path(__file__).with_name("hub_program.py")


def fetch(name: str, revision: str | None, always: Sequence[str], weights: Sequence[Sequence[str]], tell: Tell) -> Path:
    """The directory in the hub's cache, with the files of these patterns; see `hub_program` for `always` and `weights`.

    Raises:
        ModelNotFoundError: says whom it asked, what came of it and what to do.
    """
    from huggingface_hub import constants

    tell(f"asking {constants.ENDPOINT} for {name}, {at(revision)}")
    with _program({"name": name, "revision": revision, "always": list(always), "weights": list(weights)}) as answers:
        fetching = _Fetching(name, at(revision), answers)
        fetching.expect(START_S)
        fetching.needed = fetching.expect(constants.HF_HUB_ETAG_TIMEOUT + GRACE_S)
        return fetching.follow(tell)


def at(revision: str | None) -> str:
    """How a revision is called."""
    return f"revision {revision!r}" if revision else "the default revision"


@dataclass(slots=True)
class _Fetching:
    """What the program says; `needed` is its second answer, with the bytes that are missing and the room there is."""

    name: str
    at: str
    answers: "queue.Queue[dict[str, Any]]"
    needed: dict[str, Any] | None = None

    def expect(self, within_s: float, silent_s: float = 0.0) -> dict[str, Any]:
        """The next answer, if it comes `within_s` after a silence of `silent_s`.

        Raises:
            ModelNotFoundError: there is none, or it tells of a failure.
        """
        try:
            answer = self.answers.get(timeout=max(0.0, within_s - silent_s))
        except queue.Empty:
            raise HubError(complaint(self.name, self.at, "silent", f"{within_s:.0f} s")) from None
        if answer["said"] == "fails":
            kind = HubError if answer["why"] in _PASSING else ModelNotFoundError
            raise kind(complaint(self.name, self.at, answer["why"], answer["text"], self.needed))
        return answer

    def follow(self, tell: Tell) -> Path:
        """Wait until all is here, and tell now and then how much is. Raises ModelNotFoundError: nothing comes."""
        assert self.needed is not None
        has, told_s, moved_s = 0, time.monotonic(), time.monotonic()
        while True:
            answer = self.expect(SILENCE_S, time.monotonic() - moved_s)
            if answer["said"] == "done":
                return Path(answer["path"]).absolute()
            if answer["num_bytes"] != has:
                has, moved_s = answer["num_bytes"], time.monotonic()
            if time.monotonic() - told_s > _EVERY_S:
                told_s = time.monotonic()
                tell(f"{self.name}: {has / 1e9:.2f} of {self.needed['num_bytes'] / 1e9:.2f} GB are here")


_Answers = queue.Queue[dict[str, Any]]


@contextmanager
def _program(asked: dict[str, Any]) -> Iterator[_Answers]:
    """What the program says, while it runs; it has ended, however the block does."""
    answers: _Answers = queue.Queue()
    # A session of its own: Ctrl-C in a terminal is for the program that the user runs, which kills this one.
    process = subprocess.Popen(
        [sys.executable, "-P", str(_PROGRAM), json.dumps(asked)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, answers), daemon=True)
    reader.start()
    try:
        with undone_at_signals(process.kill):
            yield answers
    finally:
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _read(lines: IO[bytes], answers: _Answers) -> None:
    for line in lines:
        answers.put(json.loads(line))
    answers.put({"said": "fails", "why": "unreachable", "text": "the program that fetches it has ended"})


def complaint(name: str, at: str, why: str, text: str, needed: dict[str, Any] | None = None) -> str:
    """What was tried, what the hub said and what to do about it; `needed` is what there is to fetch, where known."""
    from huggingface_hub import constants

    sizes = {"num_bytes": 0, "free_bytes": 0} if needed is None else needed
    return _COMPLAINTS[why].format(
        none=f"no model {name!r}: there is no such directory, and",
        name=name,
        at=at,
        text=text,
        endpoint=constants.ENDPOINT,
        cache=constants.HF_HUB_CACHE,
        room=f"{sizes['num_bytes'] / 1e9:.2f} GB are needed and {sizes['free_bytes'] / 1e9:.2f} GB were free",
    )


_PASSING = ("disk", "silent", "unreachable")
_NETWORK = "check the network, the proxy and HF_ENDPOINT (a mirror's address), or give a directory"
_COMPLAINTS = {
    "gated": "{none} {endpoint} asks for consent first: accept the terms on {endpoint}/{name}, then set HF_TOKEN to a "
    "token of that account (or run `hf auth login`)",
    "revision": "{none} {endpoint} has the model, but not {at}: name one of its branches, tags or commits",
    "repository": "{none} {endpoint} has none of this name that you may see: check the spelling; a private model needs "
    "HF_TOKEN (or `hf auth login`)",
    "name": "{none} no hub has such a name ({text}): check the spelling",
    "disk": "{name} does not fit on the disk of {cache}, {room} ({text}): make room, or set HF_HOME to a directory on "
    "another disk; what is here already is kept",
    "closed": "{name} cannot be kept in {cache} ({text}): check its permissions, or set HF_HOME to another directory",
    "offline": "{none} {cache} does not hold all of {at}; HF_HUB_OFFLINE is set: unset it once to download, or give a "
    "directory",
    "silent": "{none} {endpoint}, asked for {at}, has said nothing for {text}: " + _NETWORK,
    "unreachable": "{none} {endpoint} could not be asked for {at}, of which {cache} holds too little ({text}): "
    + _NETWORK,
}
"""By why it failed, as `hub_program` says, or by what went wrong here: `offline`, `silent`."""
