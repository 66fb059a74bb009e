"""How memory is shared out among workers: what --max-ram and --max-vram leave, or what would be the least."""

from __future__ import annotations

from streammerge.compute.machine import MIB, Allotment
from streammerge.errors import PlanError, format_size
from streammerge.plan.memory import OVERHEAD_BYTES, Memory


def allot_memory(memory: Memory, resident: int, vram: int | None, *, card_bytes: int = 0, cards: int = 1) -> Allotment:
    """Share out what --max-ram leaves beside what the process takes already; PlanError naming the least that works.

    `vram` is what may be taken of each of so many cards' memory, `card_bytes` what whole tensors take of it.
    """
    limit = memory.options.max_ram
    if vram is not None:
        _check_vram(memory, vram, card_bytes)
    if limit is None:
        return memory.allot(vram_limit=vram, card_bytes=card_bytes, cards=cards)
    needed = memory.host_lane_bytes + memory.mapped_bytes[1] + memory.held_bytes
    fixed = resident + OVERHEAD_BYTES
    taking = "Python and torch take" if memory.needs_torch else "Python takes"
    if limit < fixed + needed:
        raise PlanError(
            f"--max-ram {format_size(limit)} is too small: {taking} {format_size(fixed)}, and this merge needs "
            f"{format_size(needed)} to work in",
            # one to spare: what these take is not the same to the page in every process
            advice=f"The least that works is {-(-(fixed + needed) // MIB) + 1}MiB.",
        )
    return memory.allot(limit - fixed, vram, card_bytes=card_bytes, cards=cards)


def _check_vram(memory: Memory, vram: int, card_bytes: int) -> None:
    """PlanError unless a worker's buffers fit the card's memory, and the whole tensors that it holds."""
    needed = memory.card_lane_bytes + card_bytes
    if vram >= needed:
        return
    what = f"{format_size(vram)} of memory on the card"
    if memory.options.max_vram == vram:
        what = f"--max-vram {format_size(vram)}"
    taking = f"one worker's buffers take {format_size(memory.card_lane_bytes)}"
    beside = f", and whole tensors {format_size(card_bytes)}" if card_bytes else ""
    instead = ", or use --device cpu" if card_bytes else ""
    raise PlanError(
        f"{what} is too small: {taking}{beside}", advice=f"The least that works is {-(-needed // MIB)}MiB{instead}."
    )
