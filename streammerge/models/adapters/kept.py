"""How much the factors of an adapter hold of the matrices that they stand for: what a report tells of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.models.adapters.factored import Factored


@dataclass(frozen=True, slots=True)
class Kept:
    """A matrix of which factors are written, of this rank: its norm, and that of what they miss.

    Both are None where an earlier run has written the factors.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    norm: float | None = None
    missed: float | None = None

    @property
    def error(self) -> float | None:
        """‖M − B A‖ / ‖M‖"""
        return error_of([self])

    def to_json(self) -> dict[str, Any]:
        """Plain values; the energy is the share of the squares of all singular values, less where they are clamped."""
        energy = None if self.error is None else 1 - self.error**2
        own = {"module": self.name, "shape": list(self.shape), "rank": self.rank}
        return {**own, "norm": self.norm, "missed": self.missed, "error": self.error, "energy": energy}


def error_of(kept: Sequence[Kept]) -> float | None:
    """The relative error of all of them together; None if nothing is known."""
    known = [(each.norm, each.missed) for each in kept if each.norm is not None and each.missed is not None]
    missed = math.hypot(*(one for _, one in known))
    whole = math.hypot(*(one for one, _ in known))
    return (missed / whole if whole else 0.0) if known else None


def told_of_factors(made: Factored | None, norms: Mapping[str, tuple[float, float]]) -> Mapping[str, Any]:
    """What the factors hold, all together and one by one; nothing if there are none."""
    parts = [part for part in made.written if part.has_factors] if made is not None else []
    if made is None or not parts:
        return {}
    kept = [Kept(part.name, part.shape, made.ranks[part.name], *norms.get(part.name, (None, None))) for part in parts]
    known = [each for each in kept if each.error is not None]
    worst = max(known, key=lambda each: each.error or 0.0, default=None)
    return {
        "error": error_of(kept),
        "worst": f"the greatest {worst.error:.3g} in {worst.name}" if worst else "",
        "known": len(known),
        "modules": [each.to_json() for each in kept],
    }
