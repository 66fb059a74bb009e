"""The compiled library: built with the package where there is a compiler, and done without where there is none."""

from __future__ import annotations

import array
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from streammerge.formats.readers import FileRange

VERSION: Final = 8
"""What the library has to say of itself: one of another version, left by an older build, is not used."""

KINDS: Final[Mapping[str, int]] = {"F16": 0, "BF16": 1, "F8_E4M3": 2, "F8_E5M2": 3, "F32": 4, "F64": 5}
"""The library's number for every element type that it knows: `enum element`."""

LIMITS: Final[Mapping[str, float]] = {
    "F16": 65504.0,
    "BF16": (2 - 2**-7) * 2.0**127,
    "F8_E4M3": 448.0,
    "F8_E5M2": 57344.0,
    "F32": (2 - 2**-23) * 2.0**127,
    "F64": sys.float_info.max,
}
"""The greatest finite number of each."""

CHUNK: Final = 1024
"""Elements of a register."""

SWITCH: Final = "STREAMMERGE_KERNELS"
"""The variable of the environment that is `off` for torch to compute everything."""


class Step(ctypes.Structure):
    """One step of a program."""

    _fields_ = (
        ("code", ctypes.c_int32),
        ("to", ctypes.c_int32),
        ("source", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("number", ctypes.c_double),
        ("table", ctypes.POINTER(ctypes.c_double)),
        ("seen", ctypes.c_int64 * 2),
    )


class Found(ctypes.Structure):
    """What became of values that were stored: counts, and the greatest finite magnitude before."""

    _fields_ = (
        ("nonfinite", ctypes.c_int64),
        ("overflowed", ctypes.c_int64),
        ("saturated", ctypes.c_int64),
        ("largest", ctypes.c_double),
    )


class Question(ctypes.Structure):
    """What is asked of the magnitudes of a vector, and the answer: `question` in magnitudes.h."""

    _fields_ = (
        ("code", ctypes.c_int32),
        ("vector", ctypes.c_int32),
        ("apart", ctypes.c_int32),
        ("wide", ctypes.c_int32),
        ("shift", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("low", ctypes.c_int64),
        ("high", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("cuts", ctypes.POINTER(ctypes.c_double)),
        ("out", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("above", ctypes.c_int64),
        ("inside", ctypes.c_int64),
        ("seen", ctypes.c_int64 * 2),
    )


def kernels() -> ctypes.CDLL | None:
    """The library; None where it isn't there, can't run on this CPU, or is switched off."""
    return None if os.environ.get(SWITCH) == "off" else _found()[0]


def kernels_in_use() -> str:
    """`compiled`, or why torch computes everything."""
    return f"switched off by {SWITCH}" if os.environ.get(SWITCH) == "off" else _found()[1]


@functools.cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    path = Path(__file__).with_name("_kernels" + (".dll" if sys.platform == "win32" else ".so"))
    if not path.exists():
        return None, "not built"
    if not is_able():
        return None, "this CPU has no AVX2, F16C and FMA"
    try:
        library = ctypes.CDLL(str(path))
        version = library.version()
    except (OSError, AttributeError) as error:
        return None, f"can't be loaded ({error})"
    if version != VERSION:
        return None, "built for another version"
    return declared(library), "compiled"


def is_able(machine: str = "", cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU has the instructions that the library was built for.

    On x86 those of 2013, which Linux tells; elsewhere the system's library is asked, or torch would run no better.
    """
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64"):
        return True
    if sys.platform == "win32":
        has_avx2 = 40
        return bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(has_avx2))
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "").split()
    except OSError:
        return sys.platform == "darwin"  # every Mac since 2013 has them, and what emulates one says so
    return {"avx2", "f16c", "fma"} <= set(flags)


class _Buffer(ctypes.Structure):
    """Py_buffer: what an object tells of its memory."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("rest", ctypes.c_void_p * 5),
    )


def address(memory: memoryview) -> int:
    """Where the memory is, which may be read-only; it must be kept by the caller for as long as that is used."""
    if memory.nbytes and not memory.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))
    buffer = _Buffer()
    get, release = ctypes.pythonapi.PyObject_GetBuffer, ctypes.pythonapi.PyBuffer_Release
    get(ctypes.py_object(memory), ctypes.byref(buffer), 0)
    found: int = buffer.buf or 0
    release(ctypes.byref(buffer))
    return found


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, with the types of what its functions take."""
    size, number, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
    for run in (library.run_f32, library.run_f64):
        run.argtypes = [pointer, size, pointer, size, size, pointer, number, pointer, pointer]
        run.restype = ctypes.c_int
    for gram in (library.gram_f32, library.gram_wide, library.gram_f64):
        gram.argtypes = [pointer, size, pointer, size, size, pointer, size, number, number, size, *[pointer] * 3]
        gram.restype = None
    for ask in (library.ask_f32, library.ask_f64):
        ask.argtypes = [pointer, size, pointer, size, size, pointer, pointer, size]
        ask.restype = None
    for rank in (library.rank_f32, library.rank_f64):
        rank.argtypes, rank.restype = [pointer, size, pointer, size, size, pointer, pointer, pointer], None
    library.kth.argtypes, library.kth.restype = [pointer, size, size], number
    library.count_at.argtypes, library.count_at.restype = [pointer, size, number, pointer], None
    library.equal_in_parts.argtypes = [pointer, pointer, size, number, pointer]
    library.equal_in_parts.restype = None
    library.add_counts.argtypes, library.add_counts.restype = [pointer, pointer, size], None
    library.bin_from_top.argtypes, library.bin_from_top.restype = [pointer, size, size, pointer], size
    library.read_ranges.argtypes, library.read_ranges.restype = [pointer, size], size
    library.nonfinite_in.argtypes = [number, pointer, size]
    library.nonfinite_in.restype = size
    return library


def filled(ranges: Sequence[FileRange], buffers: Sequence[memoryview]) -> int:
    """Fill the buffers with ranges of files by one call; how many could be filled."""
    library = kernels()
    if library is None:
        return 0
    wanted = array.array("q")
    for part, buffer in zip(ranges, buffers, strict=True):
        wanted.extend((part.file.descriptor, part.start, len(buffer), address(buffer)))
    found: int = library.read_ranges(wanted.buffer_info()[0], len(ranges))
    return found
