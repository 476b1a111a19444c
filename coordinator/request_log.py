"""What a launch logs of the requests of its clients: numbers; the text of prompts and answers only if asked for."""

import json

from coordinator.log import Log
from protocol import client


class RequestLog:
    """Each request has a line when it is taken and one when it ends; `with_text` adds the prompt and the answer.

    Lines for people name no request at all unless with their text. `with_text` adds the text of errors, too: it may
    quote the prompt.
    """

    def __init__(self, log: Log, *, with_text: bool) -> None:
        self._log = log
        self._with_text = with_text

    def began(self, identity: bytes, message: client.Generate, num_prompt: int) -> None:
        """A request was taken; its prompt has so many tokens."""
        self._say("request", identity, message.request_id, f"{num_prompt} prompt tokens", prompt=_text(message.prompt))

    def ended(self, identity: bytes, message: client.Finished | client.Error) -> None:
        """It was answered, or it failed."""
        if isinstance(message, client.Error):
            self._say("request failed", identity, message.request_id, message.code, error_text=message.text)
            return
        said = f"{len(message.token_ids)} new tokens in {message.stats.total_s:.2f} s, {message.finish_reason}"
        self._say("answer", identity, message.request_id, said, answer=message.text)

    def _say(self, event: str, identity: bytes, request_id: int, said: str, **texts: str) -> None:
        if not self._with_text:
            texts = {}
            if not self._log.is_json:
                return
        quoted = (
            "" if self._log.is_json else "".join(f": {json.dumps(text, ensure_ascii=False)}" for text in texts.values())
        )
        self._log.say(
            f"{event} {request_id} of client {identity.hex()}: {said}{quoted}",
            event=event.replace(" ", "_"),
            level="warning" if event == "request failed" else "info",
            client=identity.hex(),
            request_id=request_id,
            **texts,
        )


def _text(prompt: client.ChatPrompt | client.TextPrompt | client.TokenPrompt) -> str:
    """A prompt as a text: what was typed, the turns of a conversation as JSON, or token ids."""
    match prompt:
        case client.TextPrompt(text):
            return text
        case client.TokenPrompt(token_ids):
            return ",".join(map(str, token_ids))
        case client.ChatPrompt(turns):
            return json.dumps([{"role": turn.role, "content": turn.content} for turn in turns], ensure_ascii=False)
