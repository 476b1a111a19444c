"""What docs/operations.md and deploy/ say is complete, and true as far as that can be read."""

import importlib
import re
import shlex
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import make_parser
from protocol.version import VERSION
from stage_worker.cli import parse_options

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
UNITS = sorted((ROOT / "deploy").glob("*.service"))
PACKAGES = ("coordinator", "glm", "protocol", "stage_worker")
OF_OTHERS = {"--now", "--system", "--shell", "--groups"}
"""Options of systemctl and useradd."""
ENVIRONMENT = {
    "GLMPIPE_JOIN": "tcp://192.0.2.1:7410",
    "GLMPIPE_KEY": "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7",
    "GLMPIPE_DEVICE": "cuda:0",
    "GLMPIPE_OPTIONS": "--log-json",
}


def public_errors(package: str) -> set[str]:
    """All error classes that a package's errors.py defines."""
    module = importlib.import_module(f"{package}.errors")
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == module.__name__
    }


def test_every_error_has_its_row_once() -> None:
    """And every row is of an error that there is, with a meaning and a remedy."""
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \|$", TEXT.partition("## What an error means")[2], re.M)
    names = [name for name, _, _ in rows]
    assert len(names) == len(set(names))
    assert set(names) == set().union(*map(public_errors, PACKAGES))


def check_command(words: list[str]) -> None:
    """Options that this version has."""
    assert Path(words[0]).name == "glmpipe"
    if words[1] == "worker":
        parse_options(words[2:])
    else:
        make_parser().parse_args(words[1:])


def test_options_that_the_text_names_exist() -> None:
    """Each `--option` is one of some command's, or of a worker's."""
    sources = [*(ROOT / "coordinator" / "commands").glob("*.py"), ROOT / "stage_worker" / "cli.py"]
    known = {
        option
        for path in [*sources, ROOT / "coordinator" / "cli.py"]
        for option in re.findall(r'"(--[a-z-]+)"', path.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT)) - OF_OTHERS <= known


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_what_there_is(path: Path) -> None:
    """Their command line is one that the program takes; wrong requests are not started again."""
    unit = RawConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(path.read_text(encoding="utf-8"))
    command = unit["Service"]["ExecStart"].replace("%i", "name")
    check_command(shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda match: shlex.quote(ENVIRONMENT[match[1]]), command)))
    assert unit["Service"]["RestartPreventExitStatus"] == ("2 4" if "worker" in path.name else "2")
    for name in ("CacheDirectory", "StateDirectory"):
        assert unit["Service"][name] == "glmpipe" and unit["Service"][f"{name}Mode"] == "0700"
    assert unit["Service"]["User"] == "glmpipe"


def test_the_compose_file_starts_what_there_is() -> None:
    """Valid YAML; each service is a command that the program takes, opens no port, and is of this version."""
    yaml = pytest.importorskip("yaml")
    compose: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
    assert set(compose["services"]) == {"launch", "worker-cpu", "worker-cuda0", "worker-cuda1"}
    for name, service in compose["services"].items():
        words = [
            re.sub(r"\$\{(\w+)[^}]*\}", lambda match: ENVIRONMENT.get(match[1], "x"), w) for w in service["command"]
        ]
        check_command(words)
        assert "ports" not in service
        assert service["image"] == f"glmpipe:{VERSION}"
        assert service.get("profiles") == (None if name == "launch" else ["workers"])
        assert service["network_mode"] == ("none" if name == "launch" else "host")
        assert service["environment"]["GLMPIPE_CACHE_DIR"].startswith("/var/cache/glmpipe/")
        assert not any(word in str(service) for word in ("/home/", "~"))
