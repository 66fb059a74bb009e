"""The compiled loops, built with the package where there is a compiler; without one the package does without."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "streammerge/compute/kernels"


class PlainLibrary(build_ext):
    """Builds a library that is no module: it is called through ctypes, and serves every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        """`…/_kernels.so`, without the Python's version."""
        return str(Path(*fullname.split("."))) + (".dll" if sys.platform == "win32" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Those that the sources export."""
        return list(ext.export_symbols)

    def build_extension(self, ext: Extension) -> None:
        """Build with the flags that this compiler understands."""
        ext.extra_compile_args = flags(self.compiler.compiler_type)
        super().build_extension(ext)


class AnyPython(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """`py3-none-PLATFORM`"""
        return "py3", "none", super().get_tag()[2]


def flags(compiler: str) -> list[str]:
    """What makes vectors of the loops, and leaves every multiplication and addition as it is written."""
    target = sysconfig.get_platform()
    is_x86 = target.endswith(("x86_64", "amd64"))
    if compiler == "msvc":
        return ["/O2", "/fp:precise", "/std:c11", *(["/arch:AVX2"] if is_x86 else [])]
    exact = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    vectors = ["-mavx2", "-mfma", "-mf16c"]
    if target.startswith("macosx"):  # where one library may be for both kinds of processors
        vectors = [word for flag in vectors for word in ("-Xarch_x86_64", flag)]
    elif not is_x86:
        vectors = []
    return ["-std=c11", "-O3", "-fvisibility=hidden", *exact, *vectors]


setup(
    ext_modules=[
        Extension(
            "streammerge.compute.kernels._kernels",
            sorted(str(path) for path in Path(KERNELS).glob("*.c")),
            depends=sorted(str(path) for path in Path(KERNELS).glob("*.[hi]*")),
            libraries=[] if sys.platform == "win32" else ["m"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": PlainLibrary, "bdist_wheel": AnyPython},
)
