"""Lanes: a worker's own buffers, its reader, and the device on which it computes.

Buffers are numbered slots. Whoever evaluates an expression into slot s may use any slot above s for what it needs on
the way, so the slots are a stack, and a lane's memory is known before it runs. What lies in a slot is valid until the
slot is used again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Final, Literal

import torch

from streammerge.compute.costs import needs_float64
from streammerge.compute.cuda import CudaLane, pinned_bytes
from streammerge.compute.expressions import BLOCK, Job, walk
from streammerge.compute.lanes import Lane, StagedLane
from streammerge.compute.machine import VRAM_BYTES, Allotment
from streammerge.errors import DeviceError, OutOfMemoryError, machine_is_full
from streammerge.formats.readers import Reader, open_reader, page_aligned
from streammerge.tensors import DTYPES

with warnings.catch_warnings():
    # torch says once per process that a read-only buffer must not be written to; nobody writes to one here.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


NO_FLOAT64: Final = frozenset({"mps"})
"""Kinds of device that can't hold float64."""


def open_lanes(device: torch.device, io: Literal["mmap", "pread"], allotment: Allotment) -> list[Lane]:
    """As many lanes as were allotted, each with a reader of its own."""
    allocate = pinned_bytes if device.type == "cuda" else page_aligned
    readers = [open_reader(io, allotment.mapped_bytes, allocate) for _ in range(allotment.threads)]
    return [open_lane(reader, device, allotment.blocks) for reader in readers]


def open_lane(reader: Reader, device: torch.device, blocks: int = 1) -> Lane:
    """The kind of lane that the device needs, which takes so many blocks at once."""
    if device.type == "cpu":
        return Lane(reader)
    lane = CudaLane(reader, device) if device.type == "cuda" else StagedLane(reader, device)
    lane.room = blocks * BLOCK
    return lane


def find_device(name: str) -> torch.device:
    """The device of this name, `auto` being the first accelerator there is; DeviceError if it isn't there."""
    available = available_devices()
    if name == "auto":
        return torch.device(available[-1] if len(available) > 1 else "cpu")
    if name in available:
        return torch.device(name)
    raise DeviceError(
        f"no device {name!r} on this machine",
        found=[f"there is: {', '.join(available)}"],
        advice="Choose one of these with --device.",
    )


VRAM_LEFT: Final = 0.9
"""The share of a card's free memory that may be taken: other programs want some too."""


def vram_limit(device: torch.device, wanted: int | None, held: int = 0) -> int | None:
    """What may be taken of the card's memory: no more than is free now; None where there is no such memory.

    Unless told otherwise that is the lanes' share, and what whole tensors take that are held there.
    """
    if device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(device)
    return min(wanted or VRAM_BYTES + held, int(free * VRAM_LEFT))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or a device's memory has run out: torch has errors of its own for some devices' only."""
    words = ("out of memory", "can't allocate memory")
    said = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return said or isinstance(error, MemoryError)


def no_memory_left(device: torch.device) -> OutOfMemoryError:
    """The error to raise when there is not even room for the smallest windows."""
    if device.type == "cpu":
        return machine_is_full()
    return OutOfMemoryError(
        f"{device} has no memory left for this merge, however small its windows are",
        advice="Close other programs that use it, take less with --threads 1 or --max-vram, or use --device cpu.",
    )


def check_float64(device: torch.device, jobs: Iterable[Job]) -> None:
    """DeviceError if a tensor is to be computed in float64, or measured in it, on a device that has none."""
    if device.type not in NO_FLOAT64:
        return
    double = [job for job in jobs if job.compute == DTYPES["F64"] or any(map(needs_float64, walk(job.node)))]
    if double:
        raise DeviceError(
            f"{device} has no float64, which {len(double)} tensors need",
            found=[job.name for job in double],
            advice="Use --compute-dtype fp32 (unless the method itself needs float64), or another --device.",
        )


def available_devices() -> list[str]:
    """Names of the devices that torch can compute on here, the CPU first, the preferred one last."""
    found = ["cpu"]
    for kind in ("xpu", "mps", "cuda"):
        backend = getattr(torch, kind, None)
        if backend is not None and backend.is_available():
            found += [f"{kind}:{index}" for index in range(backend.device_count()) if kind != "mps"]
            found.append(kind)
    return found
