"""Renders a model's chat template, as a program of its own: what a hostile one does, it does to this process alone.

Reads lines of JSON from stdin: the template's source, then the variables of each rendering. Answers each with a line:
`{"text": ...}` or `{"error": ...}`. A rendering that takes more than `MOST_CPU_S` or memory than `MOST_BYTES` ends it.
Started by `glm.chat_template` in isolated mode, so it imports nothing of this project.
"""

import contextlib
import json
import resource
import sys
import time
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_CPU_S = 5
MOST_BYTES = 1 << 29
MOST_CHARACTERS = 8 << 20


def main() -> None:
    """Serve until stdin ends."""
    environment, template = _environment(), None
    with contextlib.suppress(TemplateError):  # what is imported late is imported now
        environment.from_string("{% for x in [1] %}{{ x }}{% endfor %}{{ raise_exception('x') }}").render()
    _restrict()
    for line in sys.stdin:
        _allow_cpu_s(MOST_CPU_S)
        try:
            received = json.loads(line)
            if template is None:
                template, text = environment.from_string(received), ""
            else:
                text = template.render(received)
            answer = {"text": text} if len(text) <= MOST_CHARACTERS else {"error": f"{len(text)} characters come of it"}
        except Exception as error:  # a template may raise anything
            answer = {"error": f"{type(error).__name__}: {error}"[:1000] if str(error) else type(error).__name__}
        print(json.dumps(answer), flush=True)


def _restrict() -> None:
    """From here on no file is opened or written and no process started, should a template get out of its sandbox."""
    datetime.now().strftime("%c %Z")  # reads the time zone, once and for all
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def _allow_cpu_s(seconds: int) -> None:
    """So much processor time from now on; then the system ends this process."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + seconds, resource.RLIM_INFINITY))


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that published templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
