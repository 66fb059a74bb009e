"""How far adapters moved a model: ‖Δ‖ / ‖W‖ of every component, of the tensors that were changed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from streammerge.models.architecture import component_of


def changes_of(squares: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Of each component: how many of its tensors are changed, and how long the difference is beside them.

    `squares` has of tensors Σ Δ² and Σ W².
    """
    own: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, each in squares.items():
        own[component_of(name)].append(each)
    return {component: _change(each) for component, each in own.items()}


def _change(squares: list[tuple[float, float]]) -> dict[str, float]:
    moved, length = (math.sqrt(math.fsum(each)) for each in zip(*squares, strict=True))
    relative = moved / length if length else math.inf
    return {"tensors": len(squares), "change": moved, "relative": relative if math.isfinite(relative) else 0.0}
