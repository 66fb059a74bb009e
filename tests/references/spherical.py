"""References of the methods on directions and angles: float64, whole tensors, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.references.linear import Context

Array = np.ndarray[Any, np.dtype[np.float64]]
Inputs = Sequence[Array]
Numbers = float | Sequence[float]


def each(value: Numbers, count: int) -> list[float]:
    return [float(value)] * count if isinstance(value, int | float) else list(value)


def weighted(inputs: Inputs, weights: Sequence[float]) -> Array:
    return np.asarray(sum((w * values for w, values in zip(weights, inputs, strict=True)), np.zeros(inputs[0].shape)))


def mean_of(inputs: Inputs, weights: Sequence[float] | None = None) -> Array:
    return np.asarray(np.average(np.stack(inputs), axis=0, weights=weights or [1.0] * len(inputs)))


def length(values: Array) -> float:
    return math.sqrt(float((values**2).sum()))


def angle(first: Array, second: Array) -> float | None:
    """By the sine and cosine of its half, which is exact for every angle; None where there is none."""
    lengths = length(first), length(second)
    if 0 in lengths:
        return None
    unit, other = first / lengths[0], second / lengths[1]
    return 2 * math.atan2(length(unit - other), length(unit + other))


def along_arc(first: Array, second: Array, t: float) -> Array:
    between = angle(first, second)
    if between is None or math.sin(between) < 1e-6:
        return (1 - t) * first + t * second
    return np.asarray((np.sin((1 - t) * between) * first + np.sin(t * between) * second) / np.sin(between))


def slerp(inputs: Inputs, *, t: float, lerp_norm: bool = False) -> Array:
    first, second = inputs
    between = angle(first, second)
    line = (1 - t) * first + t * second
    if between is None:
        return line
    if lerp_norm:
        lengths = length(first), length(second)
        direction = along_arc(first / lengths[0], second / lengths[1], t)
        return line if math.sin(between) < 1e-6 else ((1 - t) * lengths[0] + t * lengths[1]) * direction
    return line if abs(math.cos(between)) > 0.9995 else along_arc(first, second, t)


def by_slices(merge: Callable[[Inputs], Array], inputs: Inputs, *, columns: bool = False) -> Array:
    """The merge of every row (along the last dimension; of convolutions every filter), or of every column."""
    shape = inputs[0].shape
    if len(shape) < 2 or not inputs[0].size:
        return merge(inputs)
    height = shape[0] if columns or len(shape) >= 4 else inputs[0].size // shape[-1]
    matrices = [values.reshape(height, -1) for values in inputs]
    merged = [merge(vectors) for vectors in zip(*(m.T if columns else m for m in matrices), strict=True)]
    return np.stack(merged, axis=1 if columns else 0).reshape(shape)


def nuslerp(
    inputs: Inputs, *, weight: Numbers = 1.0, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Array:
    one, other = each(weight, 2)
    t = other / (one + other) if abs(one + other) >= 1e-6 else 0.5

    def merge(vectors: Inputs) -> Array:
        *base, first, second = vectors
        return base[0] + along_arc(first - base[0], second - base[0], t) if base else along_arc(first, second, t)

    return merge(inputs) if nuslerp_flatten else by_slices(merge, inputs, columns=nuslerp_row_wise)


def multislerp(
    inputs: Inputs,
    *,
    context: Context,
    weight: Numbers = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Array:
    """With the step in the tangent space that is always zero left out."""
    base = inputs[0] if context.has_base else np.zeros(inputs[0].shape)
    vectors = [model - base for model in inputs[int(context.has_base) :]]
    weights = each(weight, len(vectors))
    if normalize_weights:
        weights = [w / sum(weights) for w in weights]
    mean = weighted([vector / (length(vector) + eps) for vector in vectors], weights)
    if length(mean) < eps:
        return base + weighted(vectors, weights)
    radius = sum(w * length(vector) for w, vector in zip(weights, vectors, strict=True))
    return np.asarray(base + radius / length(mean) * mean)


def model_stock(inputs: Inputs, *, filter_wise: bool = False, pairs: str = "all", average: str = "cosine") -> Array:
    if filter_wise:
        return by_slices(lambda vectors: model_stock(vectors, pairs=pairs, average=average), inputs)
    base, *models = inputs
    tasks = [model - base for model in models]
    chosen = [(i, j) for j in range(len(tasks)) for i in range(j) if pairs == "all" or j == i + 1]
    angles = [angle(tasks[i], tasks[j]) for i, j in chosen]
    radians = [math.pi / 2 if found is None else found for found in angles]
    cosine = float(np.cos(np.mean(radians)) if average == "angle" else np.mean(np.cos(radians)))
    divisor = 1 + (len(tasks) - 1) * cosine
    share = len(tasks) * cosine / divisor if abs(divisor) > 1e-12 else 0.0
    return share * mean_of(models) + (1 - share) * base


def perpendicular_component(inputs: Inputs) -> Array:
    first, second = inputs
    square = float((first**2).sum())
    rest = second - first * (float((first * second).sum()) / square if square else 0.0)
    return (
        rest if length(rest) > 1e-12 * length(second) else np.zeros(rest.shape)
    )  # what is left of parallel ones is noise


def add_perpendicular(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, first, second = inputs
    return first + alpha * perpendicular_component([first - base, second - base])


def karcher(inputs: Inputs, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    units = [values / length(values) for values in inputs if length(values) > tol]
    if not units:
        return mean_of(inputs)
    centre = mean_of(units)
    centre = units[0] if length(centre) < tol else centre / length(centre)
    for _ in range(max_iter):
        step = np.zeros(centre.shape)
        for unit in units:
            between = angle(centre, unit)
            assert between is not None
            if between >= tol and math.sin(between) >= tol:
                step = step + between / math.sin(between) * (unit - math.cos(between) * centre) / len(units)
        if length(step) < tol:
            break
        centre = math.cos(length(step)) * centre + math.sin(length(step)) * step / length(step)
        centre = centre / length(centre)
    return np.asarray(np.mean([length(values) for values in inputs]) * centre)


def geometric_median(inputs: Inputs, *, max_iter: int = 100, eps: float = 1e-6, ftol: float = 1e-20) -> Array:
    median = mean_of(inputs)
    distance = sum(length(values - median) for values in inputs)
    for _ in range(max_iter):
        median = mean_of(inputs, [1 / max(length(values - median), eps) for values in inputs])
        before, distance = distance, sum(length(values - median) for values in inputs)
        if abs(before - distance) <= ftol * distance:
            break
    return median


SPHERICAL: Mapping[str, Any] = {
    function.__name__: function
    for function in (
        *(slerp, nuslerp, multislerp, model_stock, perpendicular_component, add_perpendicular),
        *(karcher, geometric_median),
    )
}
