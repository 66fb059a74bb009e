"""What the machine offers, and what the process takes of it."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from streammerge.errors import DeviceError

IoMode = Literal["auto", "mmap", "pread"]


LOCAL_FILE_SYSTEMS: Final = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "bcachefs", "zfs", "f2fs", "jfs", "reiserfs", "tmpfs", "overlay"}
    | {"ntfs3", "exfat", "vfat", "apfs", "hfs", "ufs"}
)
"""Where a page is fetched from a disk of this machine, as far as the name tells; anything else may be a network."""


MIB: Final = 1 << 20


PROMISED_BYTES: Final = 64 * MIB
"""What a merge takes above a bare `import torch`, unless it can't do with so little, or is allowed more."""


OWN_BYTES: Final = 6 * MIB
"""What the modules of this package take, and of those that they import what torch does not."""


DEFAULT_WORK_BYTES: Final = 36 * MIB
"""What all lanes together may take unless --max-ram says otherwise."""


MAPPED_BYTES: Final = (6 * MIB, 2 * MIB)
"""The most and the least that a lane keeps mapped of its inputs."""


MAX_THREADS: Final = 8
"""More workers than this wait for memory, disk and the interpreter rather than compute by torch, unless the user asks
for them."""


MAX_COMPILED_THREADS: Final = 16
"""The same of workers that compute by compiled loops, which hold no lock."""


VRAM_BYTES: Final = 512_000_000
"""What the lanes may take of a card's memory unless --max-vram says otherwise."""


CARD_THREADS: Final = 3
"""The most workers on a card unless the user asks for more: each has two ranges under way, and more share one bus, and
what may be pinned: of four each would have ranges of half the length."""


CARD_BLOCKS: Final = {"cpu": 1, "mps": 4}
"""Blocks that a device of a kind takes at once at the most, if it is not the usual number: what shares memory with the
CPU gains nothing by longer ranges than hide its launches."""


USUAL_BLOCKS: Final = 8
"""The same of all others: a card is as soon done with 2²¹ elements as with one block."""


CARD_PINNED_BYTES: Final = 96 * MIB
"""Main memory that all lanes of a card may pin, if their ranges are of more than one block."""


BARE_BYTES: Final = 40 * MIB
"""What Python and this package take without torch, beside the workers' buffers and what is kept of headers."""


@dataclass(frozen=True, slots=True)
class Allotment:
    """How the memory is shared out: the number of lanes, what each keeps mapped, what all takes together, and how much
    of that is for whole tensors and the like, which are held beside the lanes' buffers.

    `blocks` is how many blocks of elements a lane takes at once: on a card more than one. Lanes are spread over so many
    `cards`.
    """

    threads: int
    mapped_bytes: int
    work_bytes: int
    held_bytes: int = 0
    blocks: int = 1
    cards: int = 1


def share_out(
    lane_bytes: int,
    threads: int | None = None,
    limit: int | None = None,
    *,
    device_bytes: int = 0,
    device_limit: int | None = None,
    most_threads: int = MAX_THREADS,
    mapped: tuple[int, int] = MAPPED_BYTES,
    devices: int = 1,
) -> Allotment:
    """As many lanes of this size, and what they keep `mapped`, as fit the limit and as there are cores for; one at the
    least.

    `device_limit` bounds what the lanes take on each of so many `devices`: as much as in main memory, unless
    `device_bytes` says more of each.
    """
    most, least = mapped
    limit = max(limit or DEFAULT_WORK_BYTES, lane_bytes + least)
    count = min(threads or min(usable_cores(), most_threads), limit // max(lane_bytes + least, 1))
    if device_limit is not None:
        count = max(1, min(count, devices * (device_limit // max(device_bytes, lane_bytes, 1))))
    kept = min(most, limit // count - lane_bytes)
    return Allotment(count, kept, count * (lane_bytes + kept))


def choose_io(io: IoMode, paths: Iterable[Path]) -> Literal["mmap", "pread"]:
    """What `auto` means for these files: memory mapping, but reading where mapping is unsafe or slower.

    Windows charges mappings against the commit limit and keeps mapped files locked; on a network mount a page fault is
    a round trip, and a connection that breaks is a bus error instead of an exception. In a virtual machine every first
    touch of a page walks two levels of page tables: reading measured 5 to 25 % faster there, in less resident memory.
    """
    if io != "auto":
        return io
    if sys.platform == "win32" or is_virtual_machine():
        return "pread"
    return "mmap" if all(_file_system(path) in LOCAL_FILE_SYSTEMS for path in paths) else "pread"


def is_virtual_machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor says that a hypervisor runs it; false where it can't be asked."""
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False
    return "hypervisor" in flags.split()


def _file_system(path: Path) -> str:
    """The type of the file system that holds the path, "" where the system doesn't tell."""
    import psutil

    resolved = path.resolve()
    try:
        mounts = [part for part in psutil.disk_partitions(all=True) if resolved.is_relative_to(part.mountpoint)]
    except OSError:
        return ""
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""


CARDS: Final = ("nvidia*", "kfd", "dxg", "dri/renderD*", "accel/accel*")
"""What Linux calls the cards of Nvidia, AMD, those that Windows lends to its Linux, and of Intel and others."""


def may_have_cards(devices: Path = Path("/dev")) -> bool:
    """Whether Linux knows of any card; false on other systems."""
    return sys.platform == "linux" and any(any(devices.glob(card)) for card in CARDS)


def choose_device(name: str, devices: Path = Path("/dev")) -> str:
    """What `auto` means where there can be no card, the CPU: then torch needn't be asked for one."""
    return "cpu" if name == "auto" and sys.platform == "linux" and not may_have_cards(devices) else name


def cards_of(name: str, devices: Path = Path("/dev")) -> int:
    """How many cards a device's name stands for, as far as that is known without torch; one at the least."""
    kind, _, which = name.partition(":")
    if which != "all":
        return name.count(",") + 1
    if kind != "cuda" or sys.platform != "linux":
        return 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(len([word for word in visible.split(",") if word.strip()]), 1)
    return max(len([*devices.glob("nvidia[0-9]*")]), 1)


def usable_cores() -> int:
    """The CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """The process's resident set size now."""
    import psutil  # late: it takes a tenth of the time in which a plan is made

    return int(psutil.Process().memory_info().rss)


CGROUP: Final = Path("/sys/fs/cgroup")


def free_bytes(cgroup: Path = CGROUP) -> int:
    """The memory that the machine, or the container that this process runs in, could give to programs now."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit, taken = ((cgroup / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        return max(min(free, int(limit) - int(taken)), 0)
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return free


def peak_resident_bytes() -> int:
    """The greatest resident set size that the process has had.

    On Linux from /proc, because getrusage's figure survives exec and so may be the parent's.
    """
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def torch_version() -> str:
    """The version of torch, without importing it; "none" where it is not installed, which compiled loops can do."""
    import importlib.metadata  # late: it takes a tenth of the time in which a plan is made

    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def import_torch() -> None:
    """Import torch without looking for garbage on the way: there is none, and the search takes a tenth of the time.

    DeviceError if it is not there, or can't be loaded, as where a process may have too little memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        raise DeviceError(
            f"torch can't be loaded: {error}",
            advice="Allow the process more memory (ulimit -v), or install torch anew: pip install --force-reinstall "
            "torch.",
        ) from error
    finally:
        if enabled:
            gc.enable()
