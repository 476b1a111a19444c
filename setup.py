"""Builds the native CPU kernels: one small library for each instruction set, all from the same sources.

Everything else about the package is in pyproject.toml. The libraries are optional: where there is no compiler, or it
does not know an instruction set, the install goes on and glm.kernels uses what there is, at the least torch. They
have a plain C interface and know neither Python nor torch, so one build serves every version of both.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("glm/kernels/native")
COMMON = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-pthread",
]
COMMON.append("-Wno-maybe-uninitialized")  # GCC 12 warns of its own AVX-512 header
AVX512 = ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [*AVX512, "-mprefer-vector-width=512"],
        "avx512_bf16": [*AVX512, "-mprefer-vector-width=512", "-mavx512bf16"],
    }


class BuildKernels(build_ext):
    """Libraries for ctypes: objects apart for each instruction set, no Python module inside."""

    def build_extension(self, ext: Extension) -> None:
        temporary, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = temporary

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            f"glm.kernels._{name}",
            sources=[str(path) for path in sorted(NATIVE.glob("*.cpp"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            extra_compile_args=[*COMMON, *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, flags in FLAGS.items()
    ],
)
