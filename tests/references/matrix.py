"""References of the methods on matrices: float64, whole tensors, numpy's own decompositions, from the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.references.spherical import Array, Inputs

Triplets = tuple[Array, Array, Array]


def as_matrices(inputs: Inputs, weight: float | Sequence[float] = 1.0) -> list[Array]:
    """wᵢ (θᵢ − θ₀) with a row per filter."""
    base, *models = inputs
    weights = [weight] * len(models) if isinstance(weight, int | float) else list(weight)
    return [w * (model - base).reshape(model.shape[0], -1) for w, model in zip(weights, models, strict=True)]


def is_matrix(values: Array) -> bool:
    return values.ndim > 1 and values.size > 0


def mean_task(inputs: Inputs, weight: float | Sequence[float], scale: float) -> Array:
    """θ₀ + scale · the mean of wᵢ (θᵢ − θ₀)"""
    base, *models = inputs
    weights = [weight] * len(models) if isinstance(weight, int | float) else list(weight)
    deltas = [w * (model - base) for w, model in zip(weights, models, strict=True)]
    return np.asarray(base + scale * np.mean(deltas, axis=0))


def svd(matrix: Array, count: int | None = None) -> Triplets:
    """The `count` largest singular triplets; those of value 0 have no vectors."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    there = values > 1e-10 * values.max(initial=0)
    values, left, right = values * there, left * there, right * there[:, None]
    return left[:, :count], values[:count], right[:count]


def polar(matrix: Array) -> Array:
    left, _, right = svd(matrix)
    return np.asarray(left @ right)


def iso_c(inputs: Inputs, *, weight: float | Sequence[float] = 1.0, **lambda_: float) -> Array:
    scale = lambda_.get("lambda", 1.0)
    if not is_matrix(inputs[0]):
        return mean_task(inputs, weight, scale)
    left, values, right = svd(sum(as_matrices(inputs, weight), start=np.zeros(())))
    return np.asarray(inputs[0] + scale * values.mean() * (left @ right).reshape(inputs[0].shape))


def iso_cts(
    inputs: Inputs,
    *,
    weight: float | Sequence[float] = 1.0,
    common_space_fraction: float = 0.8,
    **lambda_: float,
) -> Array:
    scale = lambda_.get("lambda", 1.0)
    if not is_matrix(inputs[0]):
        return mean_task(inputs, weight, scale)
    deltas = as_matrices(inputs, weight)
    rank = min(deltas[0].shape)
    own = round((rank - int(rank * common_space_fraction)) / len(deltas))
    while own * len(deltas) > rank:
        own -= 1
    common = svd(sum(deltas, start=np.zeros(())), rank - own * len(deltas))
    parts = [svd(delta - common[0] @ (common[0].T @ delta), own) for delta in deltas]
    left, values, right = joined([*parts, common])
    made = values.mean() * polar(left) @ polar(right)
    return np.asarray(inputs[0] + scale * made.reshape(inputs[0].shape))


def joined(parts: Sequence[Triplets]) -> Triplets:
    left, values, right = zip(*parts, strict=True)
    return np.concatenate(left, axis=1), np.concatenate(values), np.concatenate(right)


def tsv_m(inputs: Inputs, *, weight: float | Sequence[float] = 1.0, svd: str = "exact", **lambda_: float) -> Array:
    scale = lambda_.get("lambda", 1.0)
    if not is_matrix(inputs[0]) or min(as_matrices(inputs, weight)[0].shape) < len(inputs) - 1:
        return mean_task(inputs, weight, scale)
    deltas = as_matrices(inputs, weight)
    kept = min(deltas[0].shape) // len(deltas)
    left, values, right = joined([triplets(delta, kept) for delta in deltas])
    made = (polar(left) * values) @ polar(right)
    return np.asarray(inputs[0] + scale * made.reshape(inputs[0].shape))


triplets = svd  # `svd` is also a parameter's name


def svc(inputs: Inputs, *, weight: float | Sequence[float] = 1.0, alpha: float = 0.1, **lambda_: float) -> Array:
    scale = lambda_.get("lambda", 1.0)
    base, *models = inputs
    if not is_matrix(base):
        return mean_task(inputs, weight, scale * len(models))
    merged = sum(as_matrices(inputs, weight), start=np.zeros(()))
    left, values, right = svd(merged)
    made = np.zeros(merged.shape)
    for u, value, v in zip(left.T, values, right, strict=True):
        responses = [
            (u @ merged) @ (u @ delta) / max((u @ delta) @ (u @ delta), 1e-12 * value**2, 1e-300)
            for delta in as_matrices(inputs)
        ]
        made += len(models) / sum(max(alpha, response) for response in responses) * value * np.outer(u, v)
    return np.asarray(base + scale * made.reshape(base.shape))


def knots(
    inputs: Inputs,
    *,
    weight: float | Sequence[float] = 1.0,
    density: float | Sequence[float] = 1.0,
    normalize: bool = True,
    epsilon: float = 1e-4,
    **lambda_: float,
) -> Array:
    scale = lambda_.get("lambda", 1.0)
    base, *models = inputs
    if not is_matrix(base):
        merged = elect([model - base for model in models], weight, density, normalize=normalize)
        return np.asarray(base + scale * merged)
    deltas = as_matrices(inputs)
    left, values, right = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    there = values > max(epsilon, 1e-10) * values.max(initial=0)
    blocks = np.split(right[there], len(deltas), axis=1)
    merged = (left[:, there] * values[there]) @ elect(blocks, weight, density, normalize=normalize)
    return np.asarray(base + scale * merged.reshape(base.shape))


def elect(
    parts: Sequence[Array], weight: float | Sequence[float], density: float | Sequence[float], *, normalize: bool
) -> Array:
    """TIES, element by element."""
    weights, densities = (
        [given] * len(parts) if isinstance(given, int | float) else list(given) for given in (weight, density)
    )
    votes = np.stack([w * largest(part, share) for part, w, share in zip(parts, weights, densities, strict=True)])
    sign = np.where(votes.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(votes) == sign
    merged = (votes * agree).sum(axis=0)
    if normalize:
        share = np.tensordot(np.array(weights), agree.astype(float), axes=1)
        merged = merged / np.where(share == 0, 1.0, share)
    return np.asarray(merged)


def largest(values: Array, density: float) -> Array:
    """That share of the values with the largest magnitudes, one at the least; 0 instead of the others."""
    if not values.size or density == 0:
        return np.zeros_like(values)
    count = max(int(density * values.size), 1)
    magnitudes = np.sort(np.abs(values).reshape(-1))
    cut = max(magnitudes[values.size - count] * (1 - 1e-7), 1e-7 * magnitudes[-1])
    return np.where(np.abs(values) >= cut, values, 0.0)


def wudi(inputs: Inputs, *, iterations: int = 300, learning_rate: float = 1e-5, **lambda_: float) -> Array:
    """Adam on the loss as it is written, all tasks by themselves."""
    scale = lambda_.get("lambda", 1.0)
    base = inputs[0]
    if not is_matrix(base):
        return mean_task(inputs, 1.0, scale)
    deltas = [delta for delta in as_matrices(inputs) if delta.any()]
    merged = sum(deltas, start=np.zeros((base.shape[0], base.size // base.shape[0])))
    mean, square = np.zeros_like(merged), np.zeros_like(merged)
    for step in range(1, iterations + 1):
        gradient = np.zeros_like(merged)
        for delta in deltas:
            gradient += 2 * ((merged - delta) @ delta.T) @ delta / (delta**2).sum()
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        merged = merged - learning_rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return np.asarray(base + scale * merged.reshape(base.shape))


def rotate(inputs: Inputs, *, alignment: float = 1.0, alpha: float = 0.0, centralization: float = 1.0) -> Array:
    a, b = inputs
    if a.ndim < 2 or not a.size:
        return np.asarray(a + alpha * (b - a))
    is_kernel = a.ndim == 4 and math.prod(a.shape[2:]) > 1
    first, second = (x.reshape(math.prod(x.shape[: 2 if is_kernel else 1]), -1) for x in (a, b))
    means = [centralization * x.mean(axis=0) for x in (first, second)]
    first, second = first - means[0], second - means[1]
    turn = rotation(first, second, proper=alignment != round(alignment))
    made = ((1 - alpha) * first + alpha * second @ turn.T) @ power(turn, alignment)
    return np.asarray((made + (1 - alignment) * means[0] + alignment * means[1]).reshape(a.shape))


def rotation(first: Array, second: Array, *, proper: bool) -> Array:
    """The orthogonal matrix, in all dimensions, that turns the first's rows nearest to the second's."""
    left, values, right = np.linalg.svd(first.T @ second)
    known = int((values > 1e-11 * values.max(initial=0)).sum())
    if known == 0:
        return np.eye(len(left))
    outside = np.linalg.svd(left[:, known:].T @ right[known:].T)
    completion = left[:, known:] @ outside[0] @ outside[2] @ right[known:]
    turn = left[:, :known] @ right[:known] + completion
    if proper and np.linalg.det(turn) < 0:
        if known < len(left):
            u, v = left[:, known:] @ outside[0][:, -1], outside[2][-1] @ right[known:]
        else:
            u, v = left[:, -1], right[-1]
        turn = turn - 2 * np.outer(u, v)
    return np.asarray(turn)


def power(turn: Array, exponent: float) -> Array:
    """By eigenvalues: e^(i φ) becomes e^(i p φ)."""
    if exponent == round(exponent):
        return np.asarray(np.linalg.matrix_power(turn, round(exponent)))
    values, vectors = np.linalg.eig(turn)
    turned = np.exp(1j * exponent * np.angle(values))
    return np.asarray(((vectors * turned) @ np.linalg.inv(vectors)).real)


MATRIX: Mapping[str, Any] = {
    "iso_c": iso_c,
    "iso_cts": iso_cts,
    "tsv_m": tsv_m,
    "svc": svc,
    "knots": knots,
    "wudi": wudi,
    "rotate": rotate,
}
