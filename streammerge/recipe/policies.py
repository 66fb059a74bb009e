"""What may be done with tensors that a model doesn't have, or has in another shape."""

from __future__ import annotations

from typing import Final, Literal

ShapePolicy = Literal["error", "overlap", "keep", "pad", "slice"]

MissingPolicy = Literal["error", "keep", "drop"]

SHAPE_POLICIES: Final = ("error", "overlap", "keep", "pad", "slice")

MISSING_POLICIES: Final = ("error", "keep", "drop")
