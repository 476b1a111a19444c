"""The process for what a model brings along: one for each model, and each question has its own answer."""

import errno
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from glm.chat_format import ChatMessage, chat_format_for
from glm.chat_template import TemplateProcess
from glm.errors import ChatFormatError
from glm.tokenizer import load_tokenizer
from tests.tiny_tokenizers import tiny_config, train_tokenizer_json


class _Interrupted:
    """A stream on which the first wait for a line is interrupted, as by Ctrl-C."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_first = True

    def readline(self) -> bytes:
        if self._is_first:
            self._is_first = False
            raise KeyboardInterrupt
        line: bytes = self._stream.readline()
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize("closes", [True, False])
def test_behind_an_interruption_each_question_has_its_own_answer(closes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the one before, which may be another request's; also where the end of the process was interrupted, too."""
    template = TemplateProcess("{{ x }}")
    confined, process = template.confined, template.confined.process
    process.stdout = _Interrupted(process.stdout)  # type: ignore[assignment]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if not closes:
            patch.setattr(confined, "_close", lambda: None)
        template.render({"x": "the first one's secret"})
    assert [template.render({"x": str(number)}) for number in range(3)] == ["0", "1", "2"]
    assert (confined.process is process) is not closes


def test_a_model_has_one_template_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many conversations it is asked for, and from however many threads."""
    started: list[object] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(args) or popen(*args, **options))
    train_tokenizer_json(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = load_tokenizer(tmp_path, tiny_config("glm4", vocab_size=600))
    with ThreadPoolExecutor(4) as pool:
        asked = [f"hello {number}" for number in range(40)]
        ids = list(pool.map(lambda text: chat_format_for(tokenizer).encode([ChatMessage("user", text)]), asked))
    assert [tokenizer.decode(each) for each in ids] == asked
    assert len(started) == 1


def test_a_process_that_cannot_be_started_just_now_is_one_requests_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without descriptors the error says so, not that the template is slow; the next question starts it again."""
    template = TemplateProcess("{{ x }}")
    template.confined.process.kill()
    template.confined.process.wait()

    def popen(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", popen)
        for _ in range(2):
            with pytest.raises(ChatFormatError, match=r"can be started just now: Too many open files"):
                template.render({"x": "1"})
        with pytest.raises(ChatFormatError, match=r"can be started just now: Too many open files"):
            TemplateProcess("{{ x }}")
    assert template.render({"x": "2"}) == "2"
