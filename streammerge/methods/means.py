"""Means that are found step by step: every step happens among coefficients, with inner products known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from streammerge.methods.contract import Between
from streammerge.methods.registry import GramMethod, method
from streammerge.methods.statistics.gram import Gram, Products


@method(GramMethod, base="first", models=(1, None))
def karcher(
    gram: Gram, *, max_iter: Annotated[int, Between(0)] = 10, tol: Annotated[float, Between(0)] = 1e-5
) -> list[float]:
    """θ = (1/N) Σᵢ ‖θᵢ‖ · u,   u: the directions' Riemannian centre of mass on the sphere, Σᵢ log_u(θᵢ/‖θᵢ‖) = 0

    Karcher mean, Karcher 1977, as in mergekit: at most `max_iter` steps from the mean direction, until one is shorter
    than `tol`. A base is one more model. Tensors of length `tol` and less have no direction, but count in 1/N; if none
    has one, θ is their mean (zero in mergekit).
    """
    vectors = gram.models()
    lengths = [vectors.norm(i) for i in range(vectors.count)]
    pointing = [i for i, length in enumerate(lengths) if length > tol]
    if not pointing:
        return [1.0 / vectors.count] * vectors.count
    units = vectors.units(pointing)
    centre = centre_of_directions(units, max_iter, tol)
    mean_length = sum(lengths) / len(lengths)
    shares = [0.0] * vectors.count
    for place, i in enumerate(pointing):
        shares[i] = mean_length * centre[place] / lengths[i]
    return shares


def centre_of_directions(units: Products, steps: int, tolerance: float) -> list[float]:
    """The coefficients of the unit vectors in their centre of mass on the sphere, of length 1."""
    count = units.count
    centre = [1.0 / count] * count
    if units.length(centre) <= tolerance:
        centre = [1.0, *([0.0] * (count - 1))]
    centre = of_length_one(centre, units)
    for _ in range(steps):
        step = tangent(centre, units, tolerance)
        length = units.length(step)
        if length <= tolerance:
            break
        centre = [math.cos(length) * c + math.sin(length) / length * s for c, s in zip(centre, step, strict=True)]
        centre = of_length_one(centre, units)
    return centre


def tangent(centre: Sequence[float], units: Products, tolerance: float) -> list[float]:
    """The mean of the directions' logarithms at the centre: (Ωᵢ / sin Ωᵢ)(uᵢ − cos Ωᵢ · u), none for tiny angles."""
    step = [0.0] * units.count
    along = 0.0
    for i in range(units.count):
        cosine = max(-1.0, min(1.0, units.dot(centre, i)))
        angle = math.acos(cosine)
        if angle <= tolerance or math.sin(angle) <= tolerance:  # there, or on the far side, where every way is as short
            continue
        step[i] = angle / math.sin(angle) / units.count
        along += step[i] * cosine
    return [s - along * c for s, c in zip(step, centre, strict=True)]


def of_length_one(shares: Sequence[float], units: Products) -> list[float]:
    """The combination divided by its length."""
    length = units.length(shares)
    return [share / length for share in shares]


@method(GramMethod, models=(1, None))
def geometric_median(
    gram: Gram,
    *,
    max_iter: Annotated[int, Between(0)] = 100,
    eps: Annotated[float, Between(0, exclusive=True)] = 1e-6,
    ftol: Annotated[float, Between(0)] = 1e-20,
) -> list[float]:
    """θ = arg min Σᵢ ‖θᵢ − θ‖

    Weiszfeld 1937, as in sd-mecha: from the mean, θ = Σᵢ θᵢ/rᵢ / Σᵢ 1/rᵢ with rᵢ = max(‖θᵢ − θ‖, ε), at most `max_iter`
    times, until the mean distance changes by no more than its `ftol`-th part.
    """
    count = gram.count
    shares = [1.0 / count] * count
    distances = distances_to(shares, gram)
    for _ in range(max_iter):
        before = sum(distances)
        pulls = [1.0 / max(distance, eps) for distance in distances]
        shares = [pull / sum(pulls) for pull in pulls]
        distances = distances_to(shares, gram)
        if abs(before - sum(distances)) <= ftol * sum(distances):
            break
    return shares


def distances_to(shares: Sequence[float], gram: Gram) -> list[float]:
    """‖xᵢ − Σⱼ cⱼ xⱼ‖ where the shares add up to 1: from the first input all are differences, so none cancels."""
    apart = gram.from_first()
    return [apart.length([(i == j) - share for j, share in enumerate(shares)]) for i in range(len(shares))]
