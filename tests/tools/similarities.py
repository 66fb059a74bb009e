"""Comparisons of made-up tensors."""

from __future__ import annotations

import math
import random

from hypothesis import strategies as st

from streammerge.tools.comparison import Comparison, Similarity

COSINES = st.floats(-1, 1, allow_nan=False)


def similarity(cosine: float | None, name: str = "a", *, norm: float = 2.0, identical: bool = False) -> Similarity:
    """A tensor of 6 elements whose values have the same norm in both models, and this cosine."""
    difference = norm * math.sqrt(max(0.0, 2 - 2 * cosine)) if cosine is not None else norm
    return Similarity(name, (2, 3), 6, cosine, norm, norm, difference, identical)


def comparison(*cosines: float | None, identical: int = 0, **found) -> Comparison:
    """Tensors `t0`, `t1`, … of these cosines, and so many identical ones after them."""
    similarities = [similarity(cosine, f"t{number}") for number, cosine in enumerate(cosines)]
    similarities += [similarity(1.0, f"same{number}", identical=True) for number in range(identical)]
    return Comparison("a.safetensors", "b.safetensors", tuple(similarities), **found)


def fine_tune(tensors: int = 500, outliers: int = 3) -> Comparison:
    """Cosines as a fine-tune has them: crowded just below 1, with a few far off."""
    generator = random.Random(1)
    near = [1 - abs(generator.gauss(0, 0.002)) for _ in range(tensors)]
    return comparison(*near, *(0.2 + 0.1 * number for number in range(outliers)), identical=100)
