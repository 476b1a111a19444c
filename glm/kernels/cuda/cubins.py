"""Compiles the kernels for a card, once: what was compiled is kept on disk.

A file holds a digest and the binary that it is of. Its name says source, options and NVRTC; it appears whole or not at
all, so that workers may compile the same at once, and one that is damaged is compiled again.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from glm.cache_dir import cache_dir, is_own, make_private
from glm.errors import MissingKernelsError
from glm.signals import undone_at_signals

_SOURCE = Path(__file__).with_name("kernels.cu")
_DIGEST_BYTES = hashlib.sha256().digest_size


def cubin(nvrtc: Any, capability: tuple[int, int], activation: str) -> bytes:
    """The kernels for a card of that compute capability, and activations as kernels.cu names them.

    Raises:
        MissingKernelsError: NVRTC does not know such a card, or does not compile the source.
    """
    source = _SOURCE.read_text(encoding="utf-8")
    options = (f"--gpu-architecture=sm_{capability[0]}{capability[1]}", f"-DActivation={activation}")
    key = hashlib.sha256("\n".join((source, *options, str(nvrtc.version))).encode()).hexdigest()
    return kept(f"{key[:32]}.cubin", lambda: compile_source(nvrtc, source, options))


def kept(name: str, make: Callable[[], bytes]) -> bytes:
    """The contents kept under a name in the cache directory; made and put there if there are none."""
    folder = cache_directory()
    found = _read(folder / name) if folder is not None else None
    if found is not None:
        return found
    made = make()
    if folder is not None:
        with suppress(OSError):  # without a cache, the next load compiles again
            _write(folder / name, made)
    return made


def cache_directory() -> Path | None:
    """`cuda` in the cache directory; None where there is none, and for a user without a home."""
    try:
        cache = cache_dir()
    except RuntimeError:
        return None
    return None if cache is None else cache / "cuda"


def compile_source(nvrtc: Any, source: str, options: tuple[str, ...]) -> bytes:
    """CUDA C -> a binary for one architecture.

    Raises:
        MissingKernelsError: as `cubin`.
    """
    program = nvrtc.nvrtcProgram()
    try:
        nvrtc.nvrtcCreateProgram(program, source, _SOURCE.name, 0, [], [])
        try:
            nvrtc.nvrtcCompileProgram(program, len(options), list(options))
            binary = ctypes.create_string_buffer(nvrtc.nvrtcGetCUBINSize(program))
            nvrtc.nvrtcGetCUBIN(program, binary)
        finally:
            nvrtc.nvrtcDestroyProgram(program)
    except (RuntimeError, AttributeError) as error:
        what = next((line for line in str(error).splitlines() if "error:" in line), str(error).partition("\n")[0])
        version = ".".join(map(str, nvrtc.version))
        raise MissingKernelsError(
            f"NVRTC {version} cannot compile for {options[0].rpartition('=')[2]} ({what.strip()})",
            "install a torch whose CUDA version knows this card",
        ) from None
    return binary.raw


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            if not is_own(os.fstat(file.fileno())):
                return None
            stored = file.read()
    except OSError:
        return None
    contents = stored[_DIGEST_BYTES:]
    return contents if contents and hashlib.sha256(contents).digest() == stored[:_DIGEST_BYTES] else None


def _write(path: Path, contents: bytes) -> None:
    make_private(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with undone_at_signals(lambda: Path(temporary).unlink(missing_ok=True)), os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(contents).digest() + contents)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
