"""What the CPU and a card do in a second: measured once, and kept in a small file of the user's.

The file is no more than a memory: where it is missing, damaged, of another card or version, or can't be written,
nothing is known. Torch is not needed to read it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from streammerge.compute.machine import torch_version, usable_cores
from streammerge.version import __version__

FILE: Final = "rates.json"

MOST_BYTES: Final = 1 << 16
"""A larger file is none of ours."""

NODES: Final = ("nvidia[0-9]*", "kfd", "dxg")
"""What Linux calls the cards that CUDA or ROCm can use."""

DRIVER: Final = Path("/proc/driver/nvidia/gpus")
"""Where Nvidia's driver tells what cards there are."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device does in a second: bytes that are read and written, for a card sent and fetched too; elements of
    float32 that are computed, one operation each, by all workers; float64 operations of decompositions. And the seconds
    until it does anything."""

    moving: float
    computing: float
    decomposing: float
    starting: float

    @property
    def is_sensible(self) -> bool:
        """Whether all are numbers that something can take."""
        rates = (self.moving, self.computing, self.decomposing)
        return all(math.isfinite(rate) and rate > 0 for rate in rates) and 0 <= self.starting < math.inf


@dataclass(frozen=True, slots=True)
class Known:
    """The rates of the CPU and of the card, how the latter is called, and when they were measured."""

    cpu: Rates
    card: Rates
    name: str
    date: str


def cache_folder() -> Path:
    """Where such files are kept: in $STREAMMERGE_CACHE, else as the XDG specification says."""
    if own := os.environ.get("STREAMMERGE_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "streammerge"


def cards_here(driver: Path = DRIVER, devices: Path = Path("/dev")) -> str:
    """What cards Linux knows of, as far as CUDA can use them; "" where there is none."""
    if sys.platform != "linux":
        return ""
    names = sorted(path.name for pattern in NODES for path in devices.glob(pattern))
    if not names or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    models = []
    with contextlib.suppress(OSError):
        for path in sorted(driver.glob("*/information")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return ", ".join(models or names)


def key(cards: str) -> str:
    """What the rates depend on: cards, versions, cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    return f"{cards} ({visible}), {usable_cores()} cores, torch {torch_version()}, streammerge {__version__}"


def known_rates(cards: str | None = None) -> Known | None:
    """The rates that are kept of these cards, by default of those that are here; None where there are none."""
    cards = cards_here() if cards is None else cards
    if not cards:
        return None
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return _known(_kept()[key(cards)])
    return None


def _known(raw: Mapping[str, Any]) -> Known | None:
    cpu, card = (
        Rates(**{part.name: float(raw[side][part.name]) for part in fields(Rates)}) for side in ("cpu", "card")
    )
    return Known(cpu, card, str(raw["name"]), str(raw["date"])) if cpu.is_sensible and card.is_sensible else None


def _kept() -> dict[str, Any]:
    """All that is kept; nothing where the file is not what it should be."""
    path = cache_folder() / FILE
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.stat().st_size <= MOST_BYTES:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
    return {}


def can_be_kept() -> bool:
    """Whether there is a folder to write to, or one can be made."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return False
    return os.access(cache_folder(), os.W_OK)


def keep(known: Known, cards: str) -> None:
    """Keep the rates, beside what is known of other cards; if that can't be done, they are forgotten."""
    with contextlib.suppress(OSError, RuntimeError):
        kept = {**_kept(), key(cards): asdict(known)}
        text = json.dumps(kept, indent=2)
        if len(text) > MOST_BYTES:
            text = json.dumps({key(cards): asdict(known)}, indent=2)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:  # what is half written is never in its place
            made = Path(folder) / FILE
            made.write_text(text, encoding="utf-8")
            made.replace(cache_folder() / FILE)
