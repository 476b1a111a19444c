"""Fixtures every test may use."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq
from hypothesis import HealthCheck, settings

from protocol.sockets import Socket

# What a test quantises belongs in no user's cache. Tests of the cache name one of their own.
os.environ["GLMPIPE_CACHE"] = "off"

# A shell that starts tests in the background, or `nohup`, has them ignore signals, and so would all that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tiny models gain nothing from threads, and with one each, several worker processes keep out of each other's way.
torch.set_num_threads(1)

# How long an example takes says something of the machine, and nothing of the property. Examples are the same each time:
# `pytest --hypothesis-profile=default` looks for others, and `make fuzz` for many more.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A test may set torch's threads; for the next one they count again as one, or sums would round differently."""
    torch.set_num_threads(1)


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The directory with reference outputs and the publisher's tokenizers; absent on a user's machine."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data beside the repository ({SHARED.name}/ is absent)")
    return SHARED


@pytest.fixture
def context() -> "Iterator[zmq.Context[Socket]]":
    """A ZeroMQ context that is closed with all its sockets."""
    context: zmq.Context[Socket] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the launches of a test have their private directories."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="g") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)
