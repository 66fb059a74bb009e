"""Windows of files in memory, and what happens when one of them can't be read: an error instead of a dead process.

A page of a mapped file that is gone (the file was shortened, the disk or the network failed) raises SIGBUS in whatever
thread touches it, which kills a process without words. While `bus_errors_are_caught`, a handler puts zeroed memory in
the place of the thread's windows and lets the thread go on; what it computes of them is thrown away, because whoever
reads next, or gives the windows back, gets the error. Wayland's compositors guard their clients' memory this way.

It is no signal that comes at any time: it is the answer to a load from a window, so the thread is in a loop over its
elements, holds no lock, and may run Python. Anything else that raises SIGBUS kills the process as it always did.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import signal
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from streammerge.errors import CheckpointError
from streammerge.formats.files import ByteFile, read_errors

MAP_FIXED: Final = 0x10

DEFAULT: Final = ctypes.c_void_p(0)
"""The system's own handling of a signal: SIG_DFL."""

ACTION_BYTES: Final = 512
"""More than `struct sigaction` has on any system; it is kept and given back, never looked into."""


@dataclass(frozen=True, slots=True)
class _Mapped:
    """Where a window lies in memory, for as long as it is mapped."""

    mapping: weakref.ref[mmap.mmap]
    address: int
    nbytes: int
    file: ByteFile


class _Thread(threading.local):
    """The windows that a thread has mapped, and the files of those that could not be read."""

    def __init__(self) -> None:
        self.mapped: dict[int, _Mapped] = {}
        self.broken: list[ByteFile] = []


_thread = _Thread()


def map_window(file: ByteFile, start: int, nbytes: int) -> mmap.mmap:
    """Bytes [start, start + nbytes) of the file, mapped; `start` is a multiple of the system's granularity.

    Raises CheckpointError where the file or its file system can't be mapped, or the file has become too short.
    """
    with read_errors(file.path):
        try:
            mapping = mmap.mmap(file.descriptor, nbytes, access=mmap.ACCESS_READ, offset=start)
        except ValueError as error:  # Python's own look at the file's size
            file.check_unchanged()
            raise CheckpointError(f"{file.path}: can't be mapped: {error}", advice="Use --io pread.") from error
    if hasattr(signal, "SIGBUS"):
        remember(mapping, nbytes, file)
    return mapping


def remember(mapping: mmap.mmap, nbytes: int, file: ByteFile) -> None:
    """Note a window of this thread, and forget those that are unmapped."""
    mapped = _thread.mapped
    for address in [address for address, window in mapped.items() if window.mapping() is None]:
        del mapped[address]
    address = address_of(mapping)
    mapped[address] = _Mapped(weakref.ref(mapping), address, nbytes, file)


def check_windows() -> None:
    """CheckpointError if a window of this thread could not be read since this was last asked."""
    if not _thread.broken:
        return
    files, _thread.broken = _thread.broken, []
    for file in files:
        file.check_unchanged()
    names = ", ".join(sorted({str(file.path) for file in files}))
    raise CheckpointError(
        f"{names}: can't be read where it is mapped into memory: the disk or the network failed",
        advice="Check the disk; --io pread tells which file and which byte it is.",
    )


_lock = threading.Lock()
_guards = 0
_before: Any = None


@contextlib.contextmanager
def bus_errors_are_caught() -> Iterator[None]:
    """For as long as the `with` statement lasts, windows that can't be read are errors, where there is SIGBUS."""
    if not hasattr(signal, "SIGBUS"):
        yield
        return
    _guard(1)
    try:
        yield
    finally:
        _guard(-1)


def _guard(more: int) -> None:
    """Count those who want the handler; the first sets it, the last gives the one before back."""
    global _guards, _before
    with _lock:
        _guards += more
        if more > 0 and _guards == 1:
            _before = ctypes.create_string_buffer(ACTION_BYTES)
            _library().sigaction(signal.SIGBUS, None, _before)
            _library().signal(signal.SIGBUS, _handler())
        elif more < 0 and not _guards:
            _library().sigaction(signal.SIGBUS, _before, None)


def _put_zeros_in_place(number: int) -> None:
    """The handler: replace this thread's windows, once; a fault that this does not mend is not about them."""
    mapped = list(_thread.mapped.values())
    _thread.mapped.clear()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
    replaced = False
    for window in mapped:
        mapping = window.mapping()  # held, so that nobody unmaps it meanwhile
        if mapping is None:
            continue
        if _library().mmap(window.address, window.nbytes, mmap.PROT_READ, flags, -1, 0) == window.address:
            _thread.broken.append(window.file)
            replaced = True
    if not replaced:
        _library().signal(signal.SIGBUS, DEFAULT)


_kept: dict[str, Any] = {}
"""The C library and the handler, made when they are first needed, because most commands need neither."""


def _library() -> Any:  # noqa: ANN401
    """The C library, its calls described."""
    if "library" not in _kept:
        library = ctypes.CDLL(None)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = [
            *(ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
        ]
        library.signal.restype = ctypes.c_void_p
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.sigaction.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        _kept["library"] = library
    return _kept["library"]


def _handler() -> Any:  # noqa: ANN401
    """The handler's address; the handler lives as long as the process."""
    if "handler" not in _kept:
        _kept["handler"] = ctypes.CFUNCTYPE(None, ctypes.c_int)(_put_zeros_in_place)
    return ctypes.cast(_kept["handler"], ctypes.c_void_p)


class _Buffer(ctypes.Structure):
    """Python's `Py_buffer`."""

    _fields_ = (
        *(("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t)),
        *(("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("ndim", ctypes.c_int)),
        *(("format", ctypes.c_char_p), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p)),
        *(("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p)),
    )


def address_of(mapping: mmap.mmap) -> int:
    """Where the mapping lies in memory; ctypes itself tells that only of memory that may be written to."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(buffer), 0)
    try:
        return int(buffer.buf)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
