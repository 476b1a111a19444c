"""What deploy/ has is what systemd and docker take, as far as they are here to say so."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from protocol.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted(path.name for path in DEPLOY.glob("*.service"))
MOST_EXPOSED = 3.0
"""Of 10; what is left is the network, devices, and memory that kernels are made in."""


def instance(directory: Path, template: str, **changes: str) -> Path:
    """A unit made of a template, with a program that exists."""
    text = (DEPLOY / template).read_text(encoding="utf-8").replace("/opt/glmpipe/bin/glmpipe", "/bin/true")
    for name, value in changes.items():
        text, number = re.subn(rf"(?m)^{name}=.*$", f"{name}={value}", text)
        assert number
    path = directory / template.replace("@", "@chat")
    path.write_text(text, encoding="utf-8")
    return path


def analyzed(*words: str) -> "subprocess.CompletedProcess[str]":
    """What systemd-analyze says to it."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    return subprocess.run(
        ["systemd-analyze", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""},
    )


def complaints(path: Path) -> list[str]:
    """About this unit; others of the machine may have their own."""
    return [line for line in analyzed("verify", "--man=no", str(path)).stderr.splitlines() if "glmpipe" in line]


@pytest.mark.parametrize("template", UNITS)
def test_systemd_has_nothing_to_say_about_a_unit(template: str, tmp_path: Path) -> None:
    """No unknown setting, no wrong value, no program that is not there."""
    if not complaints(instance(tmp_path, template, RestartSec="soon")):
        pytest.skip("this systemd-analyze does not find a fault either")
    assert complaints(instance(tmp_path, template)) == []


@pytest.mark.parametrize("template", UNITS)
def test_a_unit_may_do_little_beyond_its_work(template: str, tmp_path: Path) -> None:
    """As systemd counts it; and what GPUs and kernels made at run time need is left."""
    said = analyzed("security", "--offline=yes", "--no-pager", str(instance(tmp_path, template))).stdout
    level = re.search(r"Overall exposure level .*: ([0-9.]+)", said)
    if level is None:
        pytest.skip("this systemd-analyze does not look at files")
    assert float(level[1]) <= MOST_EXPOSED, said
    text = (DEPLOY / template).read_text(encoding="utf-8")
    assert not re.search("(?m)^(PrivateDevices|DevicePolicy|ProtectClock|MemoryDenyWriteExecute|ProcSubset)=", text)


def test_docker_takes_the_compose_file() -> None:
    """With every service, and nothing asked of whoever has set nothing."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("there is no docker compose here")
    words = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "--profile", "workers", "config", "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_image_is_made_of_what_there_is() -> None:
    """The file that compose names; nothing copied that is not there, nobody's root, this version."""
    yaml = pytest.importorskip("yaml")
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    builds = [service["build"] for service in compose["services"].values()]
    assert all((DEPLOY / build["context"]).resolve() == ROOT for build in builds)
    (name,) = {build["dockerfile"] for build in builds}
    text = re.sub(r"\\\n", "", (ROOT / name).read_text(encoding="utf-8"))
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in steps} <= {"FROM", "RUN", "COPY", "USER", "CMD"}
    assert [rest for word, rest in steps if word == "COPY"] == [". /src"]
    assert [word for word, _ in steps][-2:] == ["USER", "CMD"] and ["USER", "glmpipe"] in steps
    assert (ROOT / "constraints.txt").exists() and f"glmpipe:{VERSION}" in text
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".*", "**/*.so", "deploy/models", "deploy/plans"} <= set(ignored)
