"""Finds the CUDA libraries that came with torch, and lets cpm_kernels' NVRTC and launch layer use them.

cpm_kernels looks for `libnvrtc.so` and `libcuda.so` where a CUDA toolkit would have put them, and says "Library cuda is
not initialized" at the first call if there is none. A machine with torch needs no toolkit: NVRTC comes as a wheel, with
a version in its name, and the driver's library is there as `libcuda.so.1`. Only the two modules that are needed are
imported: the package itself would import `pkg_resources`, which newer setuptools lack, query every card of the host,
and read kernels for cards up to sm_86.
"""

import ctypes
import ctypes.util
import importlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glm.errors import MissingKernelsError

_PACKAGE = "cpm_kernels"
_DRIVER = "libcuda.so.1"
_NVRTC = re.compile(r"libnvrtc(-[0-9a-f]+)?\.so(\.(?P<major>\d+)[.\d]*)?")


@dataclass(frozen=True, slots=True)
class LaunchLayer:
    """cpm_kernels' modules `library.nvrtc` and `library.cuda`, with their libraries loaded."""

    nvrtc: Any
    driver: Any


def launch_layer() -> LaunchLayer:
    """Both halves, ready to use.

    Raises:
        MissingKernelsError: something is not there; says what, and what to do.
    """
    return LaunchLayer(compiler_layer(), driver_layer())


def compiler_layer(folders: Sequence[Path] | None = None) -> Any:
    """cpm_kernels' `library.nvrtc`; NVRTC is looked for in `folders` (default: where torch has it, then the system).

    Raises:
        MissingKernelsError: there is no NVRTC, or no cpm_kernels.
    """
    path = find_nvrtc(library_folders() if folders is None else folders)
    if path is None and folders is None:
        path = ctypes.util.find_library("nvrtc")
    if path is None:
        raise MissingKernelsError("libnvrtc is missing", f"pip install {_nvrtc_wheel()}")
    for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")):
        # NVRTC opens it by name alone, and would not look beside itself.
        with suppress(OSError):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return _import_layer("nvrtc", path, f"pip install {_nvrtc_wheel()}")


def driver_layer() -> Any:
    """cpm_kernels' `library.cuda`.

    Raises:
        MissingKernelsError: there is no driver, or no cpm_kernels.
    """
    return _import_layer("cuda", _DRIVER, "install NVIDIA's driver")


def library_folders() -> list[Path]:
    """Where CUDA libraries may be, the ones that torch itself uses first."""
    torch_dir = Path(torch.__file__).parent
    spec = importlib.util.find_spec("nvidia")
    wheels = [torch_dir.parent / "nvidia", *map(Path, (spec and spec.submodule_search_locations) or ())]
    toolkits = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME")]
    return [
        *(folder for wheel in dict.fromkeys(wheels) for folder in sorted(wheel.glob("*/lib"))),
        torch_dir / "lib",
        *(Path(toolkit) / "lib64" for toolkit in (*toolkits, "/usr/local/cuda") if toolkit),
    ]


def find_nvrtc(folders: Sequence[Path]) -> str | None:
    """The first NVRTC of torch's CUDA version in `folders`, else the first of another."""
    found = [(path, match) for path in _files(folders) if (match := _NVRTC.fullmatch(path.name)) is not None]
    wanted = (torch.version.cuda or "").partition(".")[0]
    found.sort(key=lambda one: one[1]["major"] != wanted)  # stable: the order of folders stays
    return str(found[0][0]) if found else None


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        with suppress(OSError):
            yield from sorted(folder.iterdir())


def _nvrtc_wheel() -> str:
    major = (torch.version.cuda or "12").partition(".")[0]
    return f"nvidia-cuda-nvrtc-cu{major}" if int(major) < 13 else f"nvidia-cuda-nvrtc=={major}.*"


def _import_layer(name: str, library: str, remedy: str) -> Any:
    if sys.platform != "linux":
        raise MissingKernelsError("CUDA kernels run on Linux", "use a Linux host for speed")
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else sys.modules[_PACKAGE].__spec__
    if spec is None or not spec.submodule_search_locations:
        raise MissingKernelsError(f"{_PACKAGE} is missing", f"pip install {_PACKAGE}")
    try:
        with _only_submodules(list(spec.submodule_search_locations)):
            base = importlib.import_module(f"{_PACKAGE}.library.base")
            base.__dict__["unix_find_lib"] = _always(library)
            return importlib.import_module(f"{_PACKAGE}.library.{name}")
    except OSError as error:
        reason = _one_line(error).removeprefix(f"{library}: ")
        raise MissingKernelsError(f"{Path(library).name} cannot be loaded ({reason})", remedy) from None
    except (ImportError, RuntimeError, AttributeError) as error:
        raise MissingKernelsError(f"{_PACKAGE} cannot be used: {_one_line(error)}", f"pip install {_PACKAGE}") from None


def _always(library: str) -> Callable[[str], str]:
    return lambda _: library


@contextmanager
def _only_submodules(search: list[str]) -> Iterator[None]:
    """Modules of cpm_kernels can be imported without running the package's own, or finding earlier ones."""
    known = {name: module for name, module in sys.modules.items() if _is_part(name)}
    for name in known:
        del sys.modules[name]
    for name, path in ((_PACKAGE, search), (f"{_PACKAGE}.library", [str(Path(p) / "library") for p in search])):
        stand_in = types.ModuleType(name)
        stand_in.__path__ = path
        sys.modules[name] = stand_in
    try:
        yield
    finally:
        for name in [name for name in sys.modules if _is_part(name)]:
            del sys.modules[name]
        sys.modules.update(known)


def _is_part(name: str) -> bool:
    return name == _PACKAGE or name.startswith(f"{_PACKAGE}.")


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
