"""Memory and disks that do not suffice: what was asked fails with a clear word, all else goes on exactly."""

import errno
import os
import shutil
import signal
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coordinator.errors import GenerationError, LaunchError
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.convert import convert
from glm.errors import DiskSpaceError
from glm.layer_cache import CachedCheckpoint, with_cache
from glm.model import LayerStack
from glm.precision import Precision
from tests.end_to_end.faults import DECODE, FOUR, ONE_GREEDY, PREFILL, Launch, Phase, disturbed_launch
from tests.tiny_checkpoints import CAUSAL, write_checkpoint

pytestmark = pytest.mark.slow

TO_LOAD = r"stage 2 \(cpu of this host, layers 3-4, pid \d+\): cpu has no memory for layers 3-4 in fp32: give"
IN_A_STEP = "stage 2 could not do the step (out_of_memory): cpu has no memory left for this step"


def test_no_memory_to_load_ends_the_launch(tmp_path: Path) -> None:
    """The first start fails with the stage, its layers and what to do; it is not tried again in vain."""
    marker, notes = tmp_path / "marker", list[str]()
    marker.touch()
    with (
        pytest.raises(LaunchError, match=TO_LOAD),
        disturbed_launch(tmp_path, "no-memory-to-load", "stage-2", str(marker), on_note=notes.append),
    ):
        pass
    assert not any("starting it again" in note for note in notes)


def test_no_memory_to_load_again_fails_the_requests_and_no_later_one(tmp_path: Path) -> None:
    """A worker that comes back finds no room: all requests end with the reason; the next ones are served again."""
    marker = tmp_path / "marker"
    with disturbed_launch(tmp_path, "no-memory-to-load", "stage-2", str(marker)) as launch:
        launch.wanted(DECODE, ONE_GREEDY)

        def strike() -> None:
            marker.touch()
            launch.hit(signal.SIGKILL, 1)()

        for answer in launch.answers(DECODE, FOUR, strike):
            assert isinstance(answer.sequence.error, GenerationError)
            assert "could not be brought back: stage 2" in str(answer.sequence.error)
            assert "no memory for layers 3-4" in str(answer.sequence.error)
        assert launch.told[-1].startswith("given up: stage 2 (cpu of this host")
        marker.unlink()
        launch.must_survive(DECODE, ONE_GREEDY, lambda: None)


@pytest.fixture(scope="module")
def exhaustible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Launch, Path]]:
    """A launch whose second stage has no memory for one step each time that the file is made."""
    directory = tmp_path_factory.mktemp("launch")
    marker = directory / "marker"
    worker = ("no-memory-in-a-step", "stage-2", str(marker))
    with disturbed_launch(directory, *worker, steps_in_flight=2) as launch:
        yield launch, marker


@pytest.mark.parametrize("phase", [PREFILL, DECODE], ids=lambda phase: phase.name)
def test_no_memory_in_a_step_fails_its_requests_alone(exhaustible: tuple[Launch, Path], phase: Phase) -> None:
    """Those in that step end with the stage's word; the others get every token, and nobody is restarted."""
    launch, marker = exhaustible
    wanted, pids = launch.wanted(phase, FOUR), launch.pids
    answers = launch.answers(phase, FOUR, marker.touch)
    assert not marker.exists()
    assert not launch.told and launch.pids == pids
    failed = [answer for answer in answers if answer.sequence.error is not None]
    assert 1 <= len(failed) < len(answers)
    for answer in failed:
        assert isinstance(answer.sequence.error, GenerationError)
        assert str(answer.sequence.error).startswith(IN_A_STEP)
    for answer, ids in zip(answers, wanted, strict=True):
        assert answer in failed or answer.close()[1].token_ids == ids
    launch.must_be_whole()


# -- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", place], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("no small file system can be mounted here (needs root)")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(path, {**CAUSAL, "hidden_size": 64, "ffn_hidden_size": 256, "num_layers": 8})
    return path


@pytest.fixture
def seemingly_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up only after it was asked how much room it has."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**10, 0, 10**10))


@pytest.mark.usefixtures("seemingly_empty")
def test_a_disk_that_fills_up_while_converting(model_dir: Path, small_disk: Path) -> None:
    """The file, the bytes that all of it needs, what to do; and no half model, not even the directory."""
    with pytest.raises(DiskSpaceError) as caught:
        convert(model_dir, small_disk / "out", Precision.INT8, Precision.INT8)
    text = str(caught.value)
    assert "layer-0000" in text and os.strerror(errno.ENOSPC) in text and "0.07 GB" in text
    assert "make room" in text and "name another directory" in text
    assert list(small_disk.iterdir()) == []


@pytest.mark.usefixtures("seemingly_empty")
def test_a_disk_that_fills_up_while_layers_are_kept(
    model_dir: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers load all the same; the complaint names file and bytes, and only whole files stay."""
    monkeypatch.setattr("glm.layer_cache.LEAST_UNIT_BYTES", 1)
    config, cpu = load_config(model_dir), torch.device("cpu")
    source = with_cache(Checkpoint(model_dir), config, Precision.INT8, cpu, small_disk / "cache")
    assert isinstance(source, CachedCheckpoint)
    LayerStack.load(source, config, 0, config.num_layers, Precision.INT8, cpu)
    assert source.complaint is not None
    assert "layer-0000" in source.complaint and os.strerror(errno.ENOSPC) in source.complaint
    assert "MB" in source.complaint
    left = [path for path in small_disk.rglob("*") if path.is_file()]
    assert left and not [path for path in left if path.name.startswith(".")]
    again = with_cache(Checkpoint(model_dir), config, Precision.INT8, cpu, small_disk / "cache")
    assert isinstance(again, CachedCheckpoint)
    LayerStack.load(again, config, 0, config.num_layers, Precision.INT8, cpu)
    assert again.num_found == len([path for path in left if path.suffix == ".safetensors"]) > 0
