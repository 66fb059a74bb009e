"""What the machine offers, and what the process takes of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

import psutil

IoMode = Literal["auto", "mmap", "pread"]

NETWORK_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smbfs", "smb3", "9p", "afs", "fuse.sshfs", "webdav"})


def choose_io(io: IoMode, paths: Iterable[Path]) -> Literal["mmap", "pread"]:
    """What `auto` means for these files: memory mapping, but reading on Windows and from network file systems.

    Windows charges mappings against the commit limit and keeps mapped files locked; on a network mount a page fault is
    a round trip, and a connection that breaks is a bus error instead of an exception.
    """
    if io != "auto":
        return io
    if sys.platform == "win32" or any(_file_system(path) in NETWORK_FILE_SYSTEMS for path in paths):
        return "pread"
    return "mmap"


def _file_system(path: Path) -> str:
    """The type of the file system that holds the path, "" where the system doesn't tell."""
    resolved = path.resolve()
    try:
        mounts = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(part.mountpoint)]
    except OSError:
        return ""
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


def usable_cores() -> int:
    """The CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """The process's resident set size now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The greatest resident set size that the process has had.

    On Linux from /proc, because getrusage's figure survives exec and so may be the parent's.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
