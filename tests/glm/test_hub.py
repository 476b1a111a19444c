"""A model is a directory here, or something that huggingface_hub's cache holds or can fetch."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from glm.config import load_config
from glm.errors import ConfigError, ModelNotFoundError
from glm.hub import resolve_model
from tests.glm.hub_server import running_hub, serve_hub

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
from glm import hub
from glm.errors import ModelNotFoundError
told = []
find = getattr(hub, sys.argv[1])
more = () if sys.argv[1] == "find_model" else (told.append,)
try:
    answer = {"path": str(find(sys.argv[2], sys.argv[3] if sys.argv[3:] else None, *more))}
except ModelNotFoundError as error:
    answer = {"error": str(error), "kind": type(error).__name__}
print(json.dumps(answer | {"told": told, "hub_imported": "huggingface_hub" in sys.modules}))
"""


def contents(*names: str) -> dict[str, bytes]:
    return {name: name.encode() for name in names}


WANTED = contents("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.model")
NEVER = contents("modeling_chatglm.py", "model.onnx", "model.gguf", "flax_model.msgpack", "README.md")
SAFETENSORS = contents(
    "model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
)
BIN = contents("pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin")


def resolve(
    home: Path,
    *arguments: str,
    offline: bool = False,
    endpoint: str = "http://127.0.0.1:9",
    function: str = "resolve_model",
    most_file_bytes: int = resource.RLIM_INFINITY,
) -> dict[str, Any]:
    """Resolve in a process of its own: huggingface_hub reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, function, *arguments],
        env=environment(home, endpoint, offline=offline),
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, resource.RLIM_INFINITY)),
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def environment(home: Path, endpoint: str, *, offline: bool = False) -> dict[str, str]:
    """Only what a test says of the hub, and a short patience with it."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "1" if offline else "0"}
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2", "PYTHONPATH": str(REPOSITORY)}
    return {**inherited, **settings, **quiet}


def put_in_cache(home: Path, name: str, commit: str, refs: tuple[str, ...]) -> Path:
    """What a download leaves in a hub cache: blobs, links to them, refs."""
    root = home / "hub" / f"models--{name.replace('/', '--')}"
    for directory in ("blobs", "refs", f"snapshots/{commit}"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    for file_name in ("config.json", "tokenizer.model", "model.safetensors"):
        (root / "blobs" / f"{file_name}-{commit}").write_text("{}")
        (root / "snapshots" / commit / file_name).symlink_to(f"../../blobs/{file_name}-{commit}")
    for ref in refs:
        (root / "refs" / ref).write_text(commit)
    return root / "snapshots" / commit


def files_of(snapshot: str) -> set[str]:
    return {path.name for path in Path(snapshot).iterdir()}


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    """By string or path, and without importing the hub's library."""
    (tmp_path / "model").mkdir()
    assert resolve_model(tmp_path / "model") == tmp_path / "model"
    answer = resolve(tmp_path, str(tmp_path / "model"))
    assert answer["path"] == str(tmp_path / "model")
    assert not answer["hub_imported"]


@pytest.mark.parametrize("name", ["", "chatglm", "./org/name", "/no/such/model", "a/b/c", "org/", "../name"])
def test_what_is_neither_directory_nor_hub_id_is_refused(name: str) -> None:
    """The message repeats the name and says what both forms are."""
    with pytest.raises(ModelNotFoundError, match=r"no directory here.*org/name.*check the spelling") as caught:
        resolve_model(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    """Somebody who names the weights file is told that a directory is wanted."""
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match="a file, not a directory"):
        resolve_model(tmp_path / "model.safetensors")


def test_a_revision_of_a_directory_is_refused(tmp_path: Path) -> None:
    """An option that cannot have an effect is not ignored."""
    with pytest.raises(ModelNotFoundError, match="has no revision 'main': leave it out"):
        resolve_model(tmp_path, "main")


def test_a_cached_model_needs_no_network(tmp_path: Path) -> None:
    """Offline or not, each revision (default branch, tag, commit) gives its own snapshot."""
    old, new = "1" * 40, "2" * 40
    old_dir = put_in_cache(tmp_path, "org/name", old, ("v1.0",))
    new_dir = put_in_cache(tmp_path, "org/name", new, ("main",))
    assert resolve(tmp_path, "org/name", offline=True)["path"] == str(new_dir)
    assert resolve(tmp_path, "org/name", "v1.0", offline=True)["path"] == str(old_dir)
    assert resolve(tmp_path, "org/name", old, offline=True)["path"] == str(old_dir)
    assert resolve(tmp_path, "org/name")["path"] == str(new_dir)


def test_offline_without_the_model_says_how_to_get_it(tmp_path: Path) -> None:
    """An unknown model or revision in offline mode: the cache looked in, the variable, the way out."""
    put_in_cache(tmp_path, "org/name", "1" * 40, ("main",))
    for arguments in (("org/other",), ("org/name", "v9")):
        error = resolve(tmp_path, *arguments, offline=True)["error"]
        assert arguments[-1] in error
        assert str(tmp_path / "hub") in error
        assert "HF_HUB_OFFLINE is set: unset it once to download" in error


def test_only_what_a_model_needs_is_fetched(tmp_path: Path) -> None:
    """Config, tokenizer and safetensors; neither code, other formats nor sub-directories; afterwards no network."""
    unwanted = {**NEVER, **BIN, "original/model.safetensors": b"o"}
    with serve_hub({**WANTED, **SAFETENSORS, **unwanted}) as (endpoint, fetched):
        path = resolve(tmp_path, "org/name", endpoint=endpoint)["path"]
        assert set(fetched) == files_of(path) == {*WANTED, *SAFETENSORS}
        assert (Path(path) / "tokenizer.model").read_bytes() == b"tokenizer.model"
    assert resolve(tmp_path, "org/name", endpoint=endpoint)["path"] == path
    assert resolve(tmp_path, "org/name", offline=True)["path"] == path


def test_a_description_is_fetched_without_the_weights(tmp_path: Path) -> None:
    """So that a plan can be refused before gigabytes are downloaded."""
    with serve_hub({**WANTED, **SAFETENSORS}) as (endpoint, fetched):
        path = resolve(tmp_path, "org/name", endpoint=endpoint, function="resolve_description")["path"]
        assert set(fetched) == files_of(path) == set(WANTED)
        assert resolve(tmp_path, "org/name", endpoint=endpoint)["path"] == path
        assert files_of(path) == {*WANTED, *SAFETENSORS}


def test_bin_weights_are_fetched_where_there_are_no_others(tmp_path: Path) -> None:
    """A model of 2023, published as .bin only, at a named commit."""
    with serve_hub({**WANTED, **NEVER, **BIN}) as (endpoint, _):
        path = resolve(tmp_path, "org/name", "a" * 40, endpoint=endpoint)["path"]
        assert files_of(path) == {*WANTED, *BIN}


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("RepoNotFound", "check the spelling; a private model needs HF_TOKEN"),
        ("GatedRepo", "accept the terms on {endpoint}/org/name, then set HF_TOKEN"),
        ("RevisionNotFound", "not revision 'v9': name one of its branches, tags or commits"),
    ],
)
def test_what_a_hub_refuses_is_said_with_the_remedy(tmp_path: Path, code: str, remedy: str) -> None:
    """A typo, a gated model, an unknown revision: named with the endpoint that was asked."""
    with serve_hub({}, error_code=code) as (endpoint, _):
        error = resolve(tmp_path, "org/name", "v9", endpoint=endpoint)["error"]
    assert "no model 'org/name'" in error
    assert endpoint in error
    assert remedy.format(endpoint=endpoint) in error


def test_an_endpoint_that_does_not_answer_is_named(tmp_path: Path) -> None:
    """No connection and nothing cached: which address, why, and what to check."""
    answer = resolve(tmp_path, "org/name")
    error = answer["error"]
    assert answer["kind"] == "HubError"
    assert "http://127.0.0.1:9 could not be asked" in error
    assert "check the network, the proxy and HF_ENDPOINT" in error


@contextmanager
def tarpit(drip: bytes = b"") -> Iterator[tuple[str, list[socket.socket]]]:
    """An address that accepts and does not answer, or only so slowly that no reader gives up; and its connections."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()

        def serve() -> None:
            server.settimeout(0.2)
            while not ended.wait(0.2):
                with suppress(TimeoutError):
                    connections.append(server.accept()[0])
                for connection in connections:
                    try:
                        connection.send(drip)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        finally:
            ended.set()
            thread.join()
            for connection in connections:
                connection.close()


@pytest.mark.parametrize("function", ["resolve_model", "resolve_description", "find_model"])
def test_no_hub_is_asked_for_what_is_cached(tmp_path: Path, function: str) -> None:
    """Whatever became of the hub since: not one connection."""
    snapshot = put_in_cache(tmp_path, "org/name", "1" * 40, ("main",))
    with tarpit() as (endpoint, connections):
        assert resolve(tmp_path, "org/name", endpoint=endpoint, function=function)["path"] == str(snapshot)
        assert not connections


@pytest.mark.parametrize(
    "drip",
    [b"", pytest.param(b"HTTP/1.1 200 OK\r\nX-Slow: ", marks=pytest.mark.slow)],
    ids=["silent", "slow"],
)
def test_a_hub_that_does_not_answer_is_given_up(tmp_path: Path, drip: bytes) -> None:
    """Soon, with a line before that says whom it asks and for what; in the cache nothing is left half done."""
    with tarpit(drip) as (endpoint, connections):
        answer = resolve(tmp_path, "org/name", "v2", endpoint=endpoint)
        assert len(connections) == 1
    assert answer["told"] == [f"asking {endpoint} for org/name, revision 'v2'"]
    assert answer["kind"] == "HubError"
    assert endpoint in answer["error"]
    assert "check the network, the proxy and HF_ENDPOINT (a mirror's address)" in answer["error"]


def test_a_config_that_another_program_cached_is_taken_from_a_dead_hub(tmp_path: Path) -> None:
    """It may be all that is needed; that the hub could not be asked is said. Its weights cannot be had so."""
    snapshot = put_in_cache(tmp_path, "org/name", "1" * 40, ("main",))
    for name in ("tokenizer.model", "model.safetensors"):
        (snapshot / name).unlink()
    answer = resolve(tmp_path, "org/name", function="resolve_description")
    assert answer["path"] == str(snapshot)
    assert "could not be asked" in answer["told"][-1]
    assert "could not be asked" in resolve(tmp_path, "org/name")["error"]


def test_half_a_model_in_the_cache_is_completed(tmp_path: Path) -> None:
    """A shard that the index names and that is not there is fetched; what is there is not fetched again."""
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {**WANTED, **SAFETENSORS, "model.safetensors.index.json": json.dumps(index).encode()}
    with serve_hub(files) as (endpoint, fetched):
        path = Path(resolve(tmp_path, "org/name", endpoint=endpoint)["path"])
        assert resolve(tmp_path, "org/name", endpoint=endpoint, function="find_model")["path"] == str(path)
        (path / "model-00002-of-00002.safetensors").resolve().unlink()
        (path / "model-00002-of-00002.safetensors").unlink()
        assert resolve(tmp_path, "org/name", endpoint=endpoint, function="find_model")["path"] == "None"
        fetched.clear()
        assert resolve(tmp_path, "org/name", endpoint=endpoint)["path"] == str(path)
        assert fetched == ["model-00002-of-00002.safetensors"]


def test_a_model_larger_than_the_disk_is_not_begun(tmp_path: Path) -> None:
    """What is needed, what is free, and how to choose another disk."""
    claimed = {"model-00001-of-00002.safetensors": 10**17}
    with running_hub({**WANTED, **SAFETENSORS}, claimed=claimed) as hub:
        error = resolve(tmp_path, "org/name", endpoint=hub.endpoint)["error"]
        assert not set(hub.fetched) & set(SAFETENSORS)
    assert "org/name does not fit on the disk" in error
    assert "100000000.00 GB are needed" in error
    assert "set HF_HOME to a directory on another disk" in error


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """It is no fault of the network."""
    (tmp_path / "hub").touch()
    with serve_hub({**WANTED, **SAFETENSORS}) as (endpoint, _):
        error = resolve(tmp_path, "org/name", endpoint=endpoint)["error"]
    assert f"org/name cannot be kept in {tmp_path / 'hub'}" in error
    assert "set HF_HOME to another directory" in error


@pytest.mark.parametrize("name", ["a--b/c", "org/name.git", f"org/{'n' * 97}"])
def test_an_id_that_no_hub_can_have_is_told_in_a_line(tmp_path: Path, name: str) -> None:
    """Of the right form for us, and not for the hub's library."""
    error = resolve(tmp_path, name)["error"]
    assert name in error
    assert "check the spelling" in error


def test_a_disk_that_fills_while_a_model_is_fetched_is_named(tmp_path: Path) -> None:
    """As far as the system can be made to refuse a file that grows."""
    files = {**WANTED, "model.safetensors": bytes(400_000)}
    with serve_hub(files) as (endpoint, _):
        error = resolve(tmp_path, "org/name", endpoint=endpoint, most_file_bytes=200_000)["error"]
    assert "org/name does not fit on the disk" in error
    assert "set HF_HOME" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whoever_ends_leaves_no_download_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C ends it at once, and not even a killed program leaves one that goes on."""
    with running_hub({**WANTED, "model.safetensors": bytes(200_000)}, stalls=True) as hub:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "resolve_model", "org/name"],
            env=environment(tmp_path, hub.endpoint),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            while "model.safetensors" not in hub.fetched:
                assert process.poll() is None
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
        assert hub.ended.wait(60)
    assert process.returncode == -number
    assert number == signal.SIGKILL or b"KeyboardInterrupt" in said


def test_a_cached_model_is_called_by_its_hub_name(tmp_path: Path) -> None:
    """Errors name the file; a model without a name of its own gets the hub's, not the commit's."""
    snapshot = put_in_cache(tmp_path, "org/name", "1" * 40, ())
    with pytest.raises(ConfigError, match="model_type None is not supported"):
        load_config(snapshot)
    facts = {"model_type": "glm4", "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    facts |= {"intermediate_size": 8, "vocab_size": 16}
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps(facts))
    assert load_config(snapshot).name == "org/name"
