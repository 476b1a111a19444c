"""Runs what a model brings along, in a process of its own: what a hostile one does, it does to this process alone.

    python -I confined_program.py template | words

Reads lines of JSON from stdin, `{"number": ..., "question": ...}`: first the source of a chat template, or a
tokenizer.json; then in each line the variables of a rendering, or a text. Answers each with a line that has the same
number: `{"number": ..., "text": ...}`, or with `"ids"` or `"error"` in place of the text.
What takes more processor time or memory than it may ends it. Started by `glm.confined` in isolated mode, so it imports
nothing of this project.
"""

import contextlib
import json
import resource
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

MOST_CPU_S = 5
MOST_BEGIN_CPU_S = 30
"""A tokenizer.json of 20 MB takes some seconds on a slow machine, once."""
MOST_TEMPLATE_BYTES = 1 << 29
MOST_WORDS_BYTES = 1 << 31
MOST_CHARACTERS = 8 << 20
Answer = Callable[[Any], dict[str, Any]]


def main() -> None:
    """Serve until stdin ends."""
    prepare, most_bytes = {
        "template": (_templates, MOST_TEMPLATE_BYTES),
        "words": (_words, MOST_WORDS_BYTES),
    }[sys.argv[1]]
    begin, answer = prepare(), None
    _restrict(most_bytes)
    for line in sys.stdin:
        _allow_cpu_s(MOST_BEGIN_CPU_S if answer is None else MOST_CPU_S)
        received = json.loads(line)
        try:
            if answer is None:
                answer, said = begin(received["question"]), {}
            else:
                said = answer(received["question"])
        except BaseException as error:  # a template may raise anything, and a library's panic is no Exception
            said = {"error": f"{type(error).__name__}: {error}"[:1000] if str(error) else type(error).__name__}
        print(json.dumps({**said, "number": received["number"]}), flush=True)


def _restrict(most_bytes: int) -> None:
    """From here on no file is opened or written and no process started, should a template get out of its sandbox."""
    datetime.now().strftime("%c %Z")  # reads the time zone, once and for all
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _allow_cpu_s(seconds: int) -> None:
    """So much processor time from now on; then the system ends this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, resource.RLIM_INFINITY))


def _words() -> Callable[[str], Answer]:
    """Text to token ids, by a tokenizer.json's own rules."""
    import tokenizers

    def begin(source: str) -> Answer:
        backend = tokenizers.Tokenizer.from_str(source)
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        return lambda text: {"ids": backend.encode(text, add_special_tokens=False).ids}

    return begin


def _templates() -> Callable[[str], Answer]:
    """Variables to text, by a chat template."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> NoReturn:
        raise TemplateError(message)

    class Generation(Extension):
        """`{% generation %}` marks what a model is trained to say; here it only bounds a scope, as in transformers."""

        tags = {"generation"}  # noqa: RUF012 - so jinja2 has it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    # The environment that published templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = _strftime_now
    with contextlib.suppress(TemplateError):  # what is imported late is imported now
        environment.from_string("{% for x in [1] %}{{ x }}{% endfor %}{{ raise_exception('x') }}").render()

    def begin(source: str) -> Answer:
        template = environment.from_string(source)

        def render(variables: dict[str, Any]) -> dict[str, Any]:
            text = template.render(variables)
            return {"text": text} if len(text) <= MOST_CHARACTERS else {"error": f"{len(text)} characters come of it"}

        return render

    return begin


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
