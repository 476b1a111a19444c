"""A hub's model as commands find it: what is asked, what is fetched and when."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import glmpipe, start
from tests.glm.hub_server import running_hub
from tests.glm.test_hub import environment
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

GENERATE = ("generate", "--model", "org/name", "--ids", "5,6", "--max-new-tokens", "2", "--greedy", "--json", "-v")


def hub_files(model_dir: Path) -> dict[str, bytes]:
    """A model as its publisher uploads it."""
    write_checkpoint(model_dir)
    return {path.name: path.read_bytes() for path in model_dir.iterdir()}


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the environment so that an endpoint is the hub, and its cache an empty one."""

    def use(endpoint: str) -> None:
        for name, value in environment(tmp_path / "hf", endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GLMPIPE_CACHE", "off")

    return use


@pytest.mark.slow
def test_a_launch_asks_the_hub_once_and_the_next_one_not_at_all(tmp_path: Path, use_hub: Callable[[str], None]) -> None:
    """Two workers on this host are told the directory; said once whom it asks; the second run opens no connection."""
    with running_hub(hub_files(tmp_path / "model")) as hub:
        use_hub(hub.endpoint)
        code, first, said = glmpipe(*GENERATE, "--stages", "2")
        assert code == 0, said
        assert said.count(f"asking {hub.endpoint} for org/name, the default revision") == 1
        assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
        num_requests = hub.num_requests
        code, second, said = glmpipe(*GENERATE, "--stages", "2")
        assert (code, hub.num_requests) == (0, num_requests), said
        assert "asking" not in said
    assert json.loads(first)["ids"] == json.loads(second)["ids"]


@pytest.mark.slow
def test_no_weights_are_fetched_of_a_model_that_does_not_fit(tmp_path: Path, use_hub: Callable[[str], None]) -> None:
    """config.json is enough to know it; the workers know what memory there is."""
    files = hub_files(tmp_path / "model")
    files["config.json"] = json.dumps({**CAUSAL, "num_layers": 400, "ffn_hidden_size": 2**28}).encode()
    with running_hub(files) as hub:
        use_hub(hub.endpoint)
        code, _, said = glmpipe(*GENERATE)
        assert code == 1
        assert "the plan does not fit into memory, nothing was loaded" in said
        assert hub.fetched == ["config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "convert"])
def test_ctrl_c_ends_a_download_at_once(command: str, tmp_path: Path, use_hub: Callable[[str], None]) -> None:
    """Exit code 130, no traceback, and nobody who goes on fetching; what has come is kept for the next time."""
    words: tuple[str | Path, ...] = GENERATE
    if command == "convert":
        words = ("convert", "org/name", "--precision", "int8", "--out", tmp_path / "out")
    with running_hub(hub_files(tmp_path / "model"), stalls=True) as hub:
        use_hub(hub.endpoint)
        with start(*words) as process:
            while "model.safetensors" not in hub.fetched:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert hub.ended.wait(60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list((tmp_path / "hf").rglob("*.incomplete"))


@pytest.mark.slow
def test_no_weights_are_fetched_for_a_conversion_that_has_no_room(
    tmp_path: Path, use_hub: Callable[[str], None]
) -> None:
    """Neither where the disk is too small nor into a directory that is in use."""
    files = hub_files(tmp_path / "model")
    files["config.json"] = json.dumps({**CAUSAL, "num_layers": 4000, "ffn_hidden_size": 2**30}).encode()
    convert = ("convert", "org/name", "--precision", "int8", "--out")
    with running_hub(files) as hub:
        use_hub(hub.endpoint)
        code, _, said = glmpipe(*convert, tmp_path / "out")
        assert (code, "GB free: make room" in said) == (2, True), said
        code, _, said = glmpipe(*convert, tmp_path / "model")
        assert (code, "is not empty" in said) == (2, True), said
        assert hub.fetched == ["config.json"]


def test_doctor_says_which_hub_and_cache(tmp_path: Path, use_hub: Callable[[str], None]) -> None:
    """And whether it may be asked, by the names of the variables that choose."""
    use_hub("http://mirror.example")
    code, out, _ = glmpipe("doctor")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("hub"))
    assert "http://mirror.example (HF_ENDPOINT)" in line
    assert f"{tmp_path / 'hf' / 'hub'} (HF_HOME)" in line
    assert "asked for what is not there" in line
