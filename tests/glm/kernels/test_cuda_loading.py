"""From an import of cpm_kernels to a launch, with fakes of NVIDIA's libraries; and what is said without them."""

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from glm.errors import MissingKernelsError
from glm.kernels.cuda import cubins, kernels, libraries
from glm.kernels.cuda.kernels import CudaKernels, MissingKernels
from glm.kernels.cuda.libraries import compiler_layer, driver_layer, find_nvrtc, launch_layer
from glm.linear import CudaLinear, QuantizedLinear, make_linear
from glm.precision import Precision
from glm.quantization import quantize
from tests.glm.kernels.cuda_emulation import COMPILER, build

CPU = torch.device("cpu")
STREAM = 0x5EED

needs_layer = pytest.mark.skipif(
    COMPILER is None or importlib.util.find_spec("cpm_kernels") is None,
    reason="needs cpm_kernels, and g++ to build fakes of NVIDIA's libraries with",
)


class Fakes:
    """The libraries, and what they saw."""

    def __init__(self, nvrtc: Path, driver: Path) -> None:
        self.folder = nvrtc.parent
        self._nvrtc, self._driver = ctypes.CDLL(str(nvrtc)), ctypes.CDLL(str(driver))
        self._driver.fake_last_stream.restype = ctypes.c_void_p

    def emulate_with(self, library: Path) -> None:
        self._driver.fake_emulate_with(str(library).encode())

    @property
    def num_compiled(self) -> int:
        return int(self._nvrtc.fake_num_compiled())

    @property
    def last_stream(self) -> int:
        return int(self._driver.fake_last_stream())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    folder, here = tmp_path_factory.mktemp("fakes"), Path(__file__).parent
    for source, library in (("fake_nvrtc.cpp", "libnvrtc.so.12"), ("fake_driver.cpp", "libcuda-fake.so.1")):
        assert COMPILER is not None
        command = [COMPILER, "-shared", "-fPIC", "-w", str(here / source), "-o", str(folder / library), "-ldl"]
        subprocess.run(command, check=True)
    fakes = Fakes(folder / "libnvrtc.so.12", folder / "libcuda-fake.so.1")
    fakes.emulate_with(build(folder, torch.float16))
    return fakes


@pytest.fixture
def fakes(built: Fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    """A card of sm_61, as far as torch and the libraries can tell."""
    monkeypatch.setenv("GLMPIPE_CACHE", "on")
    monkeypatch.setenv("GLMPIPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(libraries, "_DRIVER", str(built.folder / "libcuda-fake.so.1"))
    monkeypatch.setattr(libraries, "library_folders", lambda: [built.folder])
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(kernels, "_with_index", lambda device: device)
    return built


def load() -> CudaKernels | MissingKernels:
    return kernels.cuda_kernels.__wrapped__(CPU, torch.float16)


@needs_layer
def test_from_import_to_launch(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pkg_resources and without a toolkit: a product computed through cuLaunchKernel, on torch's stream."""
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    found = load()
    assert isinstance(found, CudaKernels)
    weight, x = quantize(torch.randn(9, 64), Precision.INT4), torch.randn(2, 64).half()
    linear = make_linear(weight, None, found)
    assert isinstance(linear, CudaLinear)
    assert linear.path == "CUDA kernels, float16"
    torch.testing.assert_close(linear(x), x @ weight.dequantize(torch.float16).t(), rtol=1e-2, atol=1e-2)
    assert fakes.last_stream == STREAM


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_the_import_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user of cpm_kernels finds what it would have found: nothing yet, or its own modules."""
    launch_layer()
    assert not [name for name in sys.modules if name.startswith("cpm_kernels")]
    other = SimpleNamespace(__spec__=importlib.util.find_spec("cpm_kernels"))
    monkeypatch.setitem(sys.modules, "cpm_kernels", other)
    launch_layer()
    assert sys.modules["cpm_kernels"] is other


@needs_layer
def test_compiled_once(fakes: Fakes, tmp_path: Path) -> None:
    """A second load reads the first one's file; one that was damaged is compiled again, and mended."""
    before = fakes.num_compiled
    for _ in range(2):
        assert isinstance(load(), CudaKernels)
        assert fakes.num_compiled == before + 1
    (kept,) = (tmp_path / "cuda").iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:-1], whole[:32], whole[:40] + b"?" + whole[41:]):
        kept.write_bytes(damaged)
        before = fakes.num_compiled
        assert isinstance(load(), CudaKernels)
        assert fakes.num_compiled == before + 1
        assert kept.read_bytes() == whole


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_another_card_another_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A binary is used for its architecture and source alone."""
    load()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    load()
    changed = tmp_path / "kernels.cu"
    changed.write_text("// other")
    monkeypatch.setattr(cubins, "_SOURCE", changed)
    load()
    assert len(list((tmp_path / "cuda").iterdir())) == 3


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Costs a compilation at every load, and nothing else."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLMPIPE_CACHE_DIR", str(tmp_path / "file"))
    assert isinstance(load(), CudaKernels)


def test_what_another_user_may_have_written_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Code for a card that others may change, its digest with it, is not loaded; the directory is this user's alone."""
    monkeypatch.setenv("GLMPIPE_CACHE", "on")
    monkeypatch.setenv("GLMPIPE_CACHE_DIR", str(tmp_path / "cache"))
    assert cubins.kept("one.cubin", lambda: b"first") == b"first"
    assert cubins.kept("one.cubin", lambda: b"second") == b"first"
    path = tmp_path / "cache" / "cuda" / "one.cubin"
    assert [each.stat().st_mode & 0o777 for each in (path.parents[1], path.parent, path)] == [0o700, 0o700, 0o600]
    path.chmod(0o666)
    assert cubins.kept("one.cubin", lambda: b"second") == b"second"


def test_many_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All get the whole contents, one file stays and no other."""
    monkeypatch.setenv("GLMPIPE_CACHE", "on")
    monkeypatch.setenv("GLMPIPE_CACHE_DIR", str(tmp_path))
    contents = bytes(range(256)) * 4096
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cubins.kept("one.cubin", lambda: contents), range(64)))
    assert all(one == contents for one in found)
    assert [path.name for path in (tmp_path / "cuda").iterdir()] == ["one.cubin"]


def said(make: object) -> str:
    """What a stage without kernels says of its arithmetic."""
    assert isinstance(make, MissingKernels)
    linear = make_linear(quantize(torch.randn(4, 64), Precision.INT8), None, make)
    assert isinstance(linear, QuantizedLinear)
    assert torch.isfinite(linear(torch.randn(1, 64))).all()
    assert "\n" not in linear.path
    assert len(linear.path) < 256  # what a Ready message has room for
    return linear.path


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names the wheel of torch's own CUDA version."""
    monkeypatch.setattr(libraries, "library_folders", lambda: [tmp_path, tmp_path / "nowhere"])
    monkeypatch.setattr(ctypes.util, "find_library", lambda _: None)
    assert said(load()).endswith("(libnvrtc is missing: pip install nvidia-cuda-nvrtc-cu12)")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert said(load()).endswith("(libnvrtc is missing: pip install nvidia-cuda-nvrtc==13.*)")


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_a_broken_nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Is named."""
    (tmp_path / "libnvrtc.so.12").write_text("not a library")
    monkeypatch.setattr(libraries, "library_folders", lambda: [tmp_path])
    assert "(libnvrtc.so.12 cannot be loaded (" in said(load())


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never "Library cuda is not initialized"."""
    monkeypatch.setattr(libraries, "_DRIVER", "libcuda-of-nobody.so.1")
    text = said(load())
    assert "(libcuda-of-nobody.so.1 cannot be loaded (cannot open shared object file: " in text
    assert text.endswith("): install NVIDIA's driver)")
    assert "not initialized" not in text


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_no_cpm_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says how to get it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert said(load()).endswith("(cpm_kernels is missing: pip install cpm_kernels)")


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_a_card_that_nvrtc_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC's own words, one line of them."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (13, 0))
    text = said(load())
    assert "NVRTC 12.9 cannot compile for sm_130 (nvrtc: error: invalid value for --gpu-architecture" in text
    assert text.endswith("install a torch whose CUDA version knows this card)")


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_a_binary_that_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old driver does not know what a new NVRTC makes."""
    monkeypatch.setattr(kernels, "cubin", lambda *_: b"what is this?")
    expected = "(the driver refuses the kernels (CUDA Error: device kernel image is invalid): update NVIDIA's driver)"
    assert said(load()).endswith(expected)


@needs_layer
@pytest.mark.usefixtures("fakes")
def test_cards_and_builds_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older than Pascal's sm_61; no CUDA in torch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 0))
    assert "the card is too old (sm_60)" in said(load())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this torch is not built for CUDA" in said(load())


def test_where_nvrtc_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As wheels, torch and toolkits name it; torch's version first; never the builtins or the alternative build."""
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    names = ("libnvrtc-builtins.so.12.9", "libnvrtc.alt.so.12", "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    for name in names[:3]:
        (folders[0] / name).touch()
    assert find_nvrtc([tmp_path / "nowhere", *folders]) == str(folders[0] / "libnvrtc.so.13")
    (folders[1] / "libnvrtc-672ee683.so.12.1").touch()
    assert find_nvrtc(folders) == str(folders[1] / "libnvrtc-672ee683.so.12.1")
    (folders[2] / "libnvrtc.so").touch()
    assert find_nvrtc(folders[2:]) == str(folders[2] / "libnvrtc.so")
    assert find_nvrtc([]) is None


@needs_layer
def test_the_driver_is_not_needed_to_compile(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two halves load apart."""
    monkeypatch.setattr(libraries, "_DRIVER", "libcuda-of-nobody.so.1")
    assert compiler_layer([fakes.folder]).version == (12, 9)
    with pytest.raises(MissingKernelsError, match="libcuda-of-nobody"):
        driver_layer()
