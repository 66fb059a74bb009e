"""Lanes: a worker's own buffers, its reader, and the device on which it computes.

Buffers are numbered slots. Whoever evaluates an expression into slot s may use any slot above s for what it needs on
the way, so the slots are a stack, and a lane's memory is known before it runs. What lies in a slot is valid until the
slot is used again.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import torch

from streammerge.compute.costs import needs_float64
from streammerge.compute.cuda import CudaLane
from streammerge.compute.expressions import BLOCK, walk
from streammerge.compute.job import Job
from streammerge.compute.lanes import Lane, StagedLane
from streammerge.compute.machine import VRAM_BYTES, Allotment
from streammerge.errors import DeviceError, OutOfMemoryError, machine_is_full
from streammerge.formats.readers import Reader, open_reader
from streammerge.tensors import DTYPES

with warnings.catch_warnings():
    # torch says once per process that a read-only buffer must not be written to; nobody writes to one here.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


NO_FLOAT64: Final = frozenset({"mps"})
"""Kinds of device that can't hold float64."""


def open_lanes(devices: Sequence[torch.device], io: Literal["mmap", "pread"], allotment: Allotment) -> list[Lane]:
    """As many lanes as were allotted, spread over the devices in turn, each with a reader of its own."""
    readers = [open_reader(io, allotment.mapped_bytes) for _ in range(allotment.threads)]
    return [
        open_lane(reader, device, allotment.blocks)
        for reader, device in zip(readers, itertools.cycle(devices), strict=False)
    ]


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
    raise _not_there(name, available)


def _not_there(name: str, available: Sequence[str]) -> DeviceError:
    """The error for a device that this machine has not."""
    return DeviceError(
        f"no device {name!r} on this machine",
        found=[f"there is: {', '.join(available)}"],
        advice="Choose one of these with --device.",
    )


def find_devices(name: str) -> tuple[torch.device, ...]:
    """The devices that share the work: `cuda:all`, several with commas between them, or one as `find_device` does it.

    DeviceError if one isn't there, or is named twice, and if they are not alike: then the bytes of products and
    decompositions would depend on which of them had made a tensor.
    """
    kind, _, which = name.partition(":")
    if which == "all":
        available = available_devices()
        found = [one for one in available if one.startswith(f"{kind}:")]
        if not found:
            raise _not_there(name, available)
        devices = tuple(map(torch.device, found))
    else:
        devices = tuple(map(find_device, name.split(",")))
    _check_alike(name, devices)
    return devices


def _check_alike(name: str, devices: Sequence[torch.device]) -> None:
    """DeviceError unless all are cards of one kind, each one named once."""
    if len(devices) == 1:
        return
    if any(device.type == "cpu" or device.index is None for device in devices):
        raise DeviceError(
            f"--device {name}: only cards with a number can share the work",
            advice="Name them as in cuda:0,cuda:1, or all of them: cuda:all.",
        )
    if len(set(devices)) < len(devices):
        raise DeviceError(f"--device {name} names a card twice", advice="Name each card once.")
    models = [model_of(device) for device in devices]
    if len(set(models)) > 1:
        raise DeviceError(
            f"--device {name}: these cards are not alike, so the output's last bits would depend on which does what",
            found=[f"{device} is {model}" for device, model in zip(devices, models, strict=True)],
            advice=f"Name those that are alike, such as --device {devices[0]}.",
        )


def model_of(device: torch.device) -> str:
    """What the card is called by its maker; "" where nothing tells."""
    backend = getattr(torch, device.type, None)
    named = getattr(backend, "get_device_name", None)
    return f"{device.type} {named(device)}" if named else device.type


VRAM_LEFT: Final = 0.9
"""The share of a card's free memory that may be taken: other programs want some too."""


def vram_limit(devices: Sequence[torch.device], wanted: int | None, held: int = 0) -> int | None:
    """What may be taken of each card's memory: no more than is free now of any; None where there is no such memory.

    Unless told otherwise that is the lanes' share, and what whole tensors take that are held there.
    """
    if devices[0].type != "cuda":
        return wanted
    free = min(torch.cuda.mem_get_info(device)[0] for device in devices)
    return min(wanted or VRAM_BYTES + held, int(free * VRAM_LEFT))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or a device's memory has run out: torch has errors of its own for some devices' only."""
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # the last of a card's libraries
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
