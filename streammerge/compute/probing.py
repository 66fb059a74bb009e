"""Measuring what the CPU and a card do in a second, in about half a second."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from datetime import date
from typing import Final

import torch

from streammerge.compute.machine import CARD_THREADS, MAX_THREADS, usable_cores
from streammerge.compute.rates import Known, Rates, can_be_kept, cards_here, keep, known_rates

MOVED: Final = 32 << 20
"""Bytes that are moved to find out how fast that is."""

STARTING: Final = 1.0
"""Seconds that importing torch takes, about; compiled loops need none of it."""

TIMES: Final = 3
"""How often each thing is done; the fastest counts."""


def rates_here() -> Known | None:
    """What is known of the card that is here; measured and kept if it is not; None where it can't be."""
    cards = cards_here()
    if not cards:
        return None
    if found := known_rates(cards):
        return found
    if not can_be_kept():
        return None  # to measure every time would take longer than it gains
    with contextlib.suppress(RuntimeError, OSError, MemoryError):
        if torch.cuda.is_available():
            measured = measure()
            keep(measured, cards)
            return measured
    return None


def measure() -> Known:
    """The rates of both."""
    began = time.perf_counter()
    card = card_device()
    torch.zeros(1, device=card).add_(1)
    wait(card)
    starting = time.perf_counter() - began
    reading, writing = files()
    cpu = torch.device("cpu")
    cores = min(usable_cores(), MAX_THREADS)
    sending, fetching = copies(card)
    lanes = min(usable_cores(), CARD_THREADS)
    # a byte is read and sent at once, and made and written at once
    moving = min(sending, fetching, lanes * min(reading, writing))
    return Known(
        Rates(cores * min(reading, writing), cores * computing(cpu, 2**17), decomposing(cpu, 192), 0.0),
        Rates(moving, computing(card, 2**21), decomposing(card, 384), STARTING + starting),
        torch.cuda.get_device_name(card) if card.type == "cuda" else str(card),
        date.today().isoformat(),
    )


def card_device() -> torch.device:
    """The card that is measured."""
    return torch.device("cuda")


def wait(device: torch.device) -> None:
    """Wait for a card to have done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """The seconds of the fastest of some times, the first of which doesn't count."""
    found = []
    for _ in range(TIMES + 1):
        began = time.perf_counter()
        work()
        wait(device)
        found.append(time.perf_counter() - began)
    return max(min(found[1:]), 1e-9)


def files() -> tuple[float, float]:
    """Bytes a second that a thread reads from the page cache, and writes to it."""
    room = bytearray(MOVED)
    with tempfile.TemporaryFile(buffering=0) as file:

        def write() -> None:
            file.seek(0)
            file.write(room)

        def read() -> None:
            file.seek(0)
            file.readinto(room)

        cpu = torch.device("cpu")
        writing = fastest(write, cpu)
        return MOVED / fastest(read, cpu), MOVED / writing


def copies(card: torch.device) -> tuple[float, float]:
    """Bytes a second that go to the card, and come back."""
    host = torch.empty(MOVED, dtype=torch.uint8, pin_memory=card.type == "cuda")
    there = torch.zeros(MOVED, dtype=torch.uint8, device=card)
    to = fastest(lambda: there.copy_(host, non_blocking=card.type == "cuda"), card)
    back = fastest(lambda: host.copy_(there, non_blocking=card.type == "cuda"), card)
    return MOVED / to, MOVED / back


def computing(device: torch.device, elements: int) -> float:
    """Elements a second that are multiplied and added, as many at once as a lane takes, by one thread on the CPU."""
    one, other = (torch.ones(elements, device=device) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return elements / fastest(lambda: one.add_(other, alpha=0.5), device)
    finally:
        torch.set_num_threads(before)


def decomposing(device: torch.device, side: int) -> float:
    """Float64 operations a second of a symmetric matrix' eigenvalues and vectors: about 10 n³."""
    matrix = torch.ones(side, side, dtype=torch.float64, device=device).tril().cumsum(0)
    return 10 * side**3 / fastest(lambda: torch.linalg.eigh(matrix @ matrix.T), device)
