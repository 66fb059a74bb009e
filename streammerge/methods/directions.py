"""Methods on directions and angles: linear combinations whose coefficients follow from inner products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from typing import Annotated, Final, Literal

from streammerge.methods.contract import Between, ParameterValue, PerModel
from streammerge.methods.linear import check_weights, normalized
from streammerge.methods.registry import GramMethod, method
from streammerge.methods.results import net
from streammerge.methods.statistics.gram import Gram, Products
from streammerge.methods.statistics.slices import Slices

NEARLY_PARALLEL: Final = 0.9995
"""Above this cosine slerp becomes the straight line, as in mergekit."""


LEAST_SINE: Final = 1e-6
"""Below this sine of an angle float32 tensors no longer tell in which plane it lies."""


LEAST_SUM: Final = 1e-6
"""Below this sum of its weights mergekit's nuslerp takes the middle."""


@method(GramMethod, base="first", models=(2, 2))
def slerp(gram: Gram, *, t: float, lerp_norm: bool = False) -> list[float]:
    """θ = (sin((1−t)Ω) θ₁ + sin(tΩ) θ₂) / sin Ω,   cos Ω = ⟨θ₁, θ₂⟩ / ‖θ₁‖‖θ₂‖

    Spherical interpolation, Shoemake 1985. The base, if there is one, is θ₁. Nearly parallel tensors are interpolated
    linearly, as in mergekit; so is a zero tensor, which has no angle (mergekit takes 90° for it, and for those whose
    length is 1e-8 and less its cosine as it is, undivided by the length). With `lerp_norm`, as in sd-mecha, only
    directions are interpolated so, at any angle, and the length is (1−t) ‖θ₁‖ + t ‖θ₂‖.
    """
    vectors = gram.models()
    cosine = vectors.cosine(0, 1)
    if not lerp_norm:
        return arc(cosine if cosine is None or abs(cosine) <= NEARLY_PARALLEL else None, t)
    if cosine is None or sine(cosine) < LEAST_SINE:
        return [1.0 - t, t]
    length = (1.0 - t) * vectors.norm(0) + t * vectors.norm(1)
    return [length * share / vectors.norm(i) for i, share in enumerate(arc(cosine, t))]


def nuslerp_slices(parameters: Mapping[str, ParameterValue]) -> Slices | None:
    """What is turned on its own: the whole tensor, each row, or each column."""
    if parameters["nuslerp_flatten"]:
        return None
    return "columns" if parameters["nuslerp_row_wise"] else "rows"


@method(GramMethod, base="optional", models=(2, 2), slices=nuslerp_slices)
def nuslerp(
    gram: Gram, *, weight: PerModel = (1.0,), nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> list[float]:
    """θ = θ₀ + (sin((1−t)Ω) δ₁ + sin(tΩ) δ₂) / sin Ω,   δᵢ = θᵢ − θ₀,   t = w₂ / (w₁ + w₂)

    mergekit's NuSLERP. Without a base θ₀ is zero. Where weights cancel to less than 1e-6, t is ½, as in mergekit. Zero
    tensors, and those whose angle is 0 or 180°, are interpolated linearly. Not flattened, each row (along the last
    dimension; of convolutions each filter) is interpolated on its own, or with `nuslerp_row_wise`, as in mergekit, each
    column.
    """
    vectors, has_base = directions(gram, weight)
    t = normalized(weight)[1] if abs(net(*weight)) >= LEAST_SUM else 0.5
    return around_base(arc(vectors.cosine(0, 1), t), has_base=has_base)


@method(GramMethod, base="optional", models=(2, None), check=check_weights)
def multislerp(
    gram: Gram, *, weight: PerModel = (1.0,), normalize_weights: bool = True, eps: float = 1e-8
) -> list[float]:
    """θ = θ₀ + Σᵢ wᵢ ‖δᵢ‖ · m / ‖m‖,   m = Σᵢ wᵢ δᵢ / (‖δᵢ‖ + ε),   δᵢ = θᵢ − θ₀

    mergekit's multislerp (Goddard 2025), whose step in the tangent space at m is always zero. Without a base θ₀ is
    zero. Where the directions cancel (‖m‖ < ε) it is Σᵢ wᵢ δᵢ, which mergekit does for two models and refuses for more.
    """
    vectors, has_base = directions(gram, weight)
    shares = normalized(weight) if normalize_weights else list(weight)
    lengths = [vectors.norm(i) for i in range(vectors.count)]
    units = [share / (length + eps) if length else 0.0 for share, length in zip(shares, lengths, strict=True)]
    mean = vectors.length(units)
    if mean > 0 and mean >= eps:
        radius = sum(share * length for share, length in zip(shares, lengths, strict=True))
        shares = [radius * unit / mean for unit in units]
    return around_base(shares, has_base=has_base)


def stock_slices(parameters: Mapping[str, ParameterValue]) -> Slices | None:
    """What has a T of its own: the whole tensor, or each row."""
    return "rows" if parameters["filter_wise"] else None


@method(GramMethod, base="required", models=(2, None), slices=stock_slices, of_tasks=True)
def model_stock(
    gram: Gram,
    *,
    filter_wise: bool = False,
    pairs: Literal["all", "consecutive"] = "all",
    average: Literal["cosine", "angle"] = "cosine",
) -> list[float]:
    """θ = T θ̄ + (1 − T) θ₀,   T = N c / (1 + (N−1) c),   c = mean of cos(θᵢ − θ₀, θⱼ − θ₀) over pairs i < j

    Model Stock, Jang et al. 2024, arXiv:2403.19522, over all pairs as in mergekit; sd-mecha takes `consecutive` ones
    only, fusion_bench the cosine of the mean `angle`. With `filter_wise` each row (of convolutions each filter) has a T
    of its own; it always has in sd-mecha, where a row is what lies along the last dimension, of convolutions only the
    kernel's width. The cosine with a zero task vector is 0. Cosines are exact where
    mergekit takes a product of norms below 1e-6 for 1e-6, which short tensors of near fine-tunes have.
    """
    tasks = gram.task_vectors()
    count = tasks.count
    if not any(map(tasks.norm, range(count))):
        return around_base([1.0 / count] * count, has_base=True)
    chosen = combinations(range(count), 2) if pairs == "all" else pairwise(range(count))
    cosines = [tasks.cosine(i, j) or 0.0 for i, j in chosen]
    if average == "angle":
        cosine = math.cos(sum(map(math.acos, cosines)) / len(cosines))
    else:
        cosine = sum(cosines) / len(cosines)
    divisor = 1.0 + (count - 1) * cosine
    # it vanishes where two task vectors are opposite, three at 120°, …: they agree on nothing, and the base stays
    share = cosine / divisor if abs(divisor) > 1e-12 else 0.0
    return around_base([share] * count, has_base=True)


@method(GramMethod, models=(2, 2))
def perpendicular_component(gram: Gram) -> list[float]:
    """θ = θ₂ − θ₁ ⟨θ₁, θ₂⟩ / ‖θ₁‖²

    What of θ₂ is perpendicular to θ₁, of task vectors as a rule; all of it where θ₁ is zero (nothing in sd-mecha).
    """
    return [-projection(gram.models(), 1, 0), 1.0]


@method(GramMethod, base="required", models=(2, 2), of_tasks=True)
def add_perpendicular(gram: Gram, *, alpha: float = 1.0) -> list[float]:
    """θ = θ₁ + α (δ₂ − δ₁ ⟨δ₁, δ₂⟩ / ‖δ₁‖²),   δᵢ = θᵢ − θ₀

    sd-mecha's add_perpendicular: adds what of the second task vector is perpendicular to the first; all of it where the
    first is zero (nothing in sd-mecha).
    """
    along = projection(gram.task_vectors(), 1, 0)
    return [-alpha * (1.0 - along), 1.0 - alpha * along, alpha]


def arc(cosine: float | None, t: float) -> list[float]:
    """slerp's coefficients at the angle of this cosine; the straight line's where there is no angle, or no plane."""
    if cosine is None or sine(cosine) < LEAST_SINE:
        return [1.0 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / sine(cosine), math.sin(t * angle) / sine(cosine)]


def sine(cosine: float) -> float:
    """The sine of the angle between 0 and 180° that has this cosine."""
    return math.sqrt((1.0 - cosine) * (1.0 + cosine))


def projection(vectors: Products, i: int, j: int) -> float:
    """⟨vᵢ, vⱼ⟩ / ‖vⱼ‖²: how much of vⱼ is in vᵢ; 0 where vⱼ is zero."""
    square = vectors.values[j][j]
    return vectors.values[i][j] / square if square else 0.0


def directions(gram: Gram, weight: PerModel) -> tuple[Products, bool]:
    """The task vectors where there is a base, which has no weight, else the models themselves; and whether there is."""
    has_base = gram.count > len(weight)
    return (gram.task_vectors() if has_base else gram.models()), has_base


def around_base(shares: Sequence[float], *, has_base: bool) -> list[float]:
    """The coefficients of θ₀ + Σᵢ cᵢ (θᵢ − θ₀), or of Σᵢ cᵢ θᵢ where there is no base."""
    return [net(1.0, *(-share for share in shares)), *shares] if has_base else list(shares)


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
