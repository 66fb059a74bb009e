"""How far adapters moved a model: ‖Δ‖ / ‖W‖ of every component, of the tensors that were changed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from streammerge.models.architecture import component_of


def changes_of(squares: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float | None]]:
    """Of each component: how many of its tensors are changed, and how long the difference is beside them.

    `squares` has of tensors Σ Δ² and Σ W². A length, or a share, that is no finite number is None.
    """
    own: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, each in squares.items():
        own[component_of(name)].append(each)
    return {component: _change(each) for component, each in own.items()}


def _change(squares: list[tuple[float, float]]) -> dict[str, float | None]:
    moved, length = (math.sqrt(math.fsum(each)) for each in zip(*squares, strict=True))
    relative = moved / length if length else math.inf if moved else 0.0
    return {"tensors": len(squares), "change": _finite(moved), "relative": _finite(relative)}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
