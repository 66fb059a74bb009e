"""Methods on directions and angles: linear combinations whose coefficients follow from inner products."""

from __future__ import annotations

import math

from streammerge.methods.registry import GramMethod, method
from streammerge.methods.statistics import Gram

NEARLY_PARALLEL = 0.9995
"""Above this cosine the sine of the angle is too small to divide by, and slerp becomes the straight line."""


@method(GramMethod, base="optional", models=(2, 2))
def slerp(gram: Gram, *, t: float) -> list[float]:
    """θ = (sin((1−t)Ω) θ₁ + sin(tΩ) θ₂) / sin Ω,   cos Ω = ⟨θ₁, θ₂⟩ / ‖θ₁‖‖θ₂‖

    Spherical interpolation, Shoemake 1985. The base, if there is one, is θ₁. Nearly parallel or zero tensors are
    interpolated linearly, as in mergekit.
    """
    cosine = gram.cosine(0, 1)
    if cosine is None or abs(cosine) > NEARLY_PARALLEL:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
