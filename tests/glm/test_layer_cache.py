"""The cache of quantised layers: found by any split, the same bits, never a half file, never in the way."""

import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from glm import layer_cache
from glm.attention import Segment
from glm.cache_dir import cache_dir
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.ends import Head, end_placement
from glm.layer_cache import CachedCheckpoint, entries, is_to_be_kept, prune, with_cache
from glm.model import LayerStack
from glm.model_source import open_checkpoint
from glm.precision import Precision
from tests.homeless import forget_home
from tests.tiny_checkpoints import CAUSAL, NATIVE, write_checkpoint
from tests.users import for_everybody, nobody

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
INT8, INT4 = Precision.INT8, Precision.INT4


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep even the layers of tiny models."""
    monkeypatch.setattr(layer_cache, "LEAST_UNIT_BYTES", 0)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", NATIVE, num_shards=2)
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class Counting(Checkpoint):
    """Counts the bytes of the tensors that are asked for."""

    num_bytes = 0

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().read(shapes):
            self.num_bytes += tensor.numel() * tensor.itemsize
            yield name, tensor


def run_stages(
    model_dir: Path, cache: Path | None, cuts: tuple[int, ...], precision: Precision = INT4
) -> tuple[torch.Tensor, int]:
    """The last hidden states and logits together, and how many bytes of the checkpoint were read."""
    config, num_bytes = load_config(model_dir), 0
    hidden = torch.randn(5, config.hidden_size, generator=torch.Generator().manual_seed(1))
    for start, end in pairwise((0, *cuts, config.num_layers)):
        checkpoint = Counting(model_dir)
        source = with_cache(checkpoint, config, precision, CPU, cache)
        stack = LayerStack.load(source, config, start, end, precision, CPU)
        hidden = stack.forward(hidden, [Segment(stack.new_cache(), 0, 5, None)])
        num_bytes += checkpoint.num_bytes
    checkpoint, placement = Counting(model_dir), end_placement(precision, CPU, config)
    source = with_cache(checkpoint, config, precision, CPU, cache)
    logits = Head.load(source, config, end_placement(Precision.FP32, CPU, config), placement).forward(hidden)
    return torch.cat((hidden.flatten(), logits.flatten())), num_bytes + checkpoint.num_bytes


def test_a_second_load_reads_no_float_matrices(model_dir: Path, cache: Path) -> None:
    """Whatever its split; only lm_head's norm is read again. The bits are those of no cache at all."""
    wanted, all_bytes = run_stages(model_dir, None, ())
    first, first_bytes = run_stages(model_dir, cache, (1,))
    assert first_bytes == all_bytes
    norm_bytes = 4 * load_config(model_dir).hidden_size
    for cuts in ((), (1,), (2, 3)):
        found, num_bytes = run_stages(model_dir, cache, cuts)
        assert num_bytes == norm_bytes
        assert torch.equal(found, wanted)
    assert torch.equal(first, wanted)


def test_precisions_and_models_have_entries_of_their_own(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    """int8 beside int4, and a fine-tune of the same shape beside both."""
    write_checkpoint(tmp_path / "tuned", NATIVE, seed=1)
    for model, precision in ((model_dir, INT8), (model_dir, INT4), (tmp_path / "tuned", INT8)):
        wanted, _ = run_stages(model, None, (), precision)
        for _ in range(2):
            assert torch.equal(run_stages(model, cache, (), precision)[0], wanted)
    assert [(e.model, e.precision) for e in entries(cache)] == [("model", "int8"), ("model", "int4"), ("tuned", "int8")]
    assert all(entry.num_units == 5 for entry in entries(cache))


def test_what_is_not_quantised_here_is_not_kept(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    """Float precisions, random weights, what was published quantised, and an entry that is there already."""
    config = load_config(model_dir)
    checkpoint = Checkpoint(model_dir)
    assert with_cache(checkpoint, config, Precision.BF16, CPU, cache) is checkpoint
    random, random_config = open_checkpoint(Path("random:tiny")), load_config(Path("random:tiny"))
    assert with_cache(random, random_config, INT4, CPU, cache) is random
    published = write_checkpoint(tmp_path / "published", {**CAUSAL, "quantization_bit": 4})
    source = Checkpoint(tmp_path / "published")
    assert with_cache(source, published, INT4, CPU, cache) is source
    assert is_to_be_kept(checkpoint, config, INT4, cache)
    run_stages(model_dir, cache, ())
    assert not is_to_be_kept(checkpoint, config, INT4, cache)


def test_small_layers_are_not_kept(model_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo model's are quantised in no time."""
    monkeypatch.setattr(layer_cache, "LEAST_UNIT_BYTES", 1 << 20)
    assert not is_to_be_kept(Checkpoint(model_dir), load_config(model_dir), INT4, cache)
    run_stages(model_dir, cache, ())
    assert not cache.exists()


def test_where_it_is() -> None:
    """A variable of its own, XDG's, the home directory's; or nowhere."""
    assert cache_dir({"GLMPIPE_CACHE_DIR": "/a/b", "XDG_CACHE_HOME": "/x"}) == Path("/a/b")
    assert cache_dir({"XDG_CACHE_HOME": "/x"}) == Path("/x/glmpipe")
    assert cache_dir({}) == Path.home() / ".cache" / "glmpipe"
    with pytest.MonkeyPatch.context() as patch:
        forget_home(patch)
        assert cache_dir({}) is None
        assert cache_dir({"GLMPIPE_CACHE_DIR": "~/b"}) == Path("~/b").absolute()
    for word in ("off", "OFF", "0", "no"):
        assert cache_dir({"GLMPIPE_CACHE": word, "GLMPIPE_CACHE_DIR": "/a/b"}) is None


# -- what can go wrong

LOAD = """
import os, resource, signal, sys
from pathlib import Path
import torch
from glm import layer_cache
from glm.checkpoint import Checkpoint
from glm.config import load_config
from glm.layer_cache import with_cache
from glm.model import LayerStack
from glm.precision import Precision
layer_cache.LEAST_UNIT_BYTES = 0
model_dir, cache, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
real, calls = os.fsync, []
def fsync(handle):
    calls.append(handle)
    if what == "kill" and len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
if what == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
config = load_config(model_dir)
source = with_cache(Checkpoint(model_dir), config, Precision.INT4, torch.device("cpu"), cache)
LayerStack.load(source, config, 0, config.num_layers, Precision.INT4, torch.device("cpu"))
print(source.num_found, source.complaint)
"""


def start(model_dir: Path, cache: Path, what: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LOAD, str(model_dir), str(cache), what]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_worker_leaves_whole_files_only(model_dir: Path, cache: Path) -> None:
    """SIGKILL while the third layer is being written: two are found, the rest is made again, the leftover goes."""
    with start(model_dir, cache, "kill") as process:
        process.communicate(timeout=120)
    assert process.returncode == -9
    (directory,) = cache.iterdir()
    (half,) = directory.glob(".*.tmp")
    assert half.name.startswith(".layer-00003")
    os.utime(half, (0, 0))
    wanted, _ = run_stages(model_dir, None, ())
    assert torch.equal(run_stages(model_dir, cache, ())[0], wanted)
    assert not half.exists()
    assert entries(cache)[0].num_units == 5


def test_a_full_disk_costs_the_cache_and_nothing_else(model_dir: Path, cache: Path) -> None:
    """A limit on the size of files: the layers load, what cannot be kept is said once, no half file stays."""
    with start(model_dir, cache, "limit") as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.startswith("0 ")
    assert "File too large" in stdout
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_nearly_full_disk_is_left_alone(model_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of it stays free, whatever the cache could use."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 9 * 10**8, 10**8))
    source = with_cache(Checkpoint(model_dir), load_config(model_dir), INT4, CPU, cache)
    assert isinstance(source, CachedCheckpoint)
    LayerStack.load(source, load_config(model_dir), 0, 2, INT4, CPU)
    assert source.complaint is not None
    assert "has only 0.1 GB free" in source.complaint
    assert not list(cache.rglob("*.safetensors"))


def test_two_workers_may_write_the_same_layers_at_once(model_dir: Path, cache: Path) -> None:
    """Both load, every file is whole, nothing is left over."""
    processes = [start(model_dir, cache, "") for _ in range(3)]
    for process in processes:
        with process:
            _, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
    wanted, _ = run_stages(model_dir, None, ())
    assert torch.equal(run_stages(model_dir, cache, (2,))[0], wanted)
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncate", "change", "empty"])
def test_a_damaged_file_is_made_again(model_dir: Path, cache: Path, damage: str) -> None:
    """It is noticed, replaced and never used."""
    wanted, _ = run_stages(model_dir, cache, ())
    path = next(cache.rglob("layer-00002.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"truncate": data[:-100], "change": data, "empty": b""}[damage])
    found, num_bytes = run_stages(model_dir, cache, ())
    assert torch.equal(found, wanted)
    assert num_bytes > 4 * load_config(model_dir).hidden_size
    assert run_stages(model_dir, cache, ())[1] == 4 * load_config(model_dir).hidden_size


@pytest.mark.parametrize("is_link", [False, True], ids=["copied", "linked"])
def test_another_models_file_is_not_taken(model_dir: Path, cache: Path, tmp_path: Path, is_link: bool) -> None:
    """The same names and shapes, other weights: made again, and what a link led to stays as it was."""
    write_checkpoint(tmp_path / "other", NATIVE, seed=1)
    wanted, _ = run_stages(model_dir, cache, ())
    run_stages(tmp_path / "other", tmp_path / "others", ())
    path, foreign = (next(each.rglob("layer-00002.safetensors")) for each in (cache, tmp_path / "others"))
    before = foreign.read_bytes()
    path.unlink()
    if is_link:
        path.symlink_to(foreign)
    else:
        shutil.copy(foreign, path)
    assert torch.equal(run_stages(model_dir, cache, ())[0], wanted)
    assert not path.is_symlink()
    assert foreign.read_bytes() == before
    assert run_stages(model_dir, cache, ())[1] == 4 * load_config(model_dir).hidden_size


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param("owner", marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")),
        "group",
        "others",
    ],
)
def test_what_another_user_may_have_written_is_not_taken(model_dir: Path, cache: Path, planted: str) -> None:
    """Whole, of this entry and with the right digests, as whoever makes them can have them: it is made again."""
    wanted, _ = run_stages(model_dir, cache, ())
    path = next(cache.rglob("layer-00002.safetensors"))
    if planted == "owner":
        os.chown(path, 65534, 65534)
    else:
        path.chmod({"group": 0o660, "others": 0o606}[planted])
    found, num_bytes = run_stages(model_dir, cache, ())
    assert torch.equal(found, wanted)
    assert num_bytes > 4 * load_config(model_dir).hidden_size
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (os.geteuid(), 0o600)


def test_what_another_user_keeps_for_himself_is_no_obstacle(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    """In a cache that several share: it is not found, not listed and not pruned, and a load goes on without it."""
    wanted, _ = run_stages(model_dir, cache, ())
    for_everybody(tmp_path)
    entry = next(path for path in cache.iterdir() if path.is_dir())
    cache.chmod(0o755)
    entry.chmod(0)
    try:
        with nobody():
            assert torch.equal(run_stages(model_dir, cache, ())[0], wanted)
            assert not entries(cache)
            assert not prune(cache)
    finally:
        entry.chmod(0o700)
    assert len(entries(cache)) == 1


def test_the_cache_is_this_users_alone(model_dir: Path, tmp_path: Path) -> None:
    """Whatever the umask: every directory that is made for it, and every file of weights."""
    before = os.umask(0)
    try:
        run_stages(model_dir, tmp_path / "home" / "cache", ())
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "home", *(tmp_path / "home").rglob("*"))}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.suffix == ".safetensors"} == {0o600}


def test_a_link_out_of_the_cache_is_not_taken(model_dir: Path, cache: Path, tmp_path: Path) -> None:
    """Even to a file that was made for this entry: whoever owns its other end could change it at any time."""
    run_stages(model_dir, cache, ())
    path = next(cache.rglob("layer-00002.safetensors"))
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    run_stages(model_dir, cache, ())
    assert not path.is_symlink()


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"model": "a\\u001b[2Jb"}', '{"model": {}}', "\0"])
def test_what_is_said_about_an_entry_may_be_anything(model_dir: Path, cache: Path, text: str) -> None:
    """It is shown as far as it can be, and never acts on a terminal."""
    run_stages(model_dir, cache, ())
    next(cache.rglob("about.json")).write_text(text)
    (entry,) = entries(cache)
    assert entry.model in ("unknown", "a[2Jb")
    assert prune(cache) == (entry,)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_no_obstacle(model_dir: Path, cache: Path) -> None:
    """Loading goes on without."""
    cache.mkdir(mode=0o500)
    wanted, _ = run_stages(model_dir, None, ())
    assert torch.equal(run_stages(model_dir, cache, ())[0], wanted)


# -- pruning


@pytest.fixture
def filled(cache: Path) -> Path:
    """Three entries of 1000 bytes, used 30, 20 and 10 days ago, and what is none of ours."""
    for days in (10, 20, 30):
        directory = cache / f"{days:016x}-int4-abcdef01"
        directory.mkdir(parents=True)
        (directory / "layer-00001.safetensors").write_bytes(b"x" * 1000)
        for path in (directory / "layer-00001.safetensors", directory):
            os.utime(path, (1e9 - days * 86400, 1e9 - days * 86400))
    (cache / "photos").mkdir()
    (cache / "photos" / "cat.jpg").write_bytes(b"cat")
    return cache


@pytest.mark.parametrize(
    ("older_than_days", "most_bytes", "left"),
    [(None, None, 0), (25, None, 2), (5, None, 0), (40, None, 3), (None, 2000, 2), (None, 1999, 1), (25, 1500, 1)],
)
def test_prune_removes_the_longest_unused(
    filled: Path, older_than_days: int | None, most_bytes: int | None, left: int
) -> None:
    """By age, by size, by both, or all; and nothing that the cache did not make."""
    older_than_s = None if older_than_days is None else older_than_days * 86400.0
    removed = prune(filled, older_than_s=older_than_s, most_bytes=most_bytes, now_s=1e9)
    assert len(removed) == 3 - left
    kept = [int(entry.directory.name.partition("-")[0], 16) for entry in entries(filled)]
    assert kept == [30, 20, 10][3 - left :]
    assert (filled / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_use_is_remembered(model_dir: Path, cache: Path) -> None:
    """A load makes an entry the last to go."""
    run_stages(model_dir, cache, (), INT8)
    run_stages(model_dir, cache, (), INT4)
    for path in cache.rglob("*"):
        os.utime(path, (1e9, 1e9))
    run_stages(model_dir, cache, (), INT8)
    assert [entry.precision for entry in entries(cache)] == ["int4", "int8"]


def test_no_cache_at_all_is_an_empty_one(tmp_path: Path) -> None:
    """Nothing was ever kept."""
    assert entries(tmp_path / "absent") == ()
    assert prune(tmp_path / "absent") == ()
