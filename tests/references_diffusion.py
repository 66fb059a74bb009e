"""References of the diffusion tools' methods: float64, whole tensors, written from the formulas."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.references_spherical import Array, Inputs, by_slices, length

if TYPE_CHECKING:
    from tests.references import Context


def over(part: Array, whole: Array) -> Array:
    """The quotient, and 0 where it has none."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def train_difference(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, a, b = inputs
    return a + 1.8 * alpha * over(np.abs(b - a), np.abs(b - a) + np.abs(b - base)) * (b - base)


def add_opposite(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, a, b = inputs
    return a + 2 * alpha * over(np.abs(a - b), np.abs(a - b) + np.abs((a - base) + (b - base))) * (b - base)


def add_strict_opposite(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, a, b = inputs
    largest = np.maximum(np.abs(a - base), np.abs(b - base)) ** 2
    return a + 2 * alpha * over(np.maximum(0, (base - a) * (b - base)), largest) * (b - base)


def multiply_difference(inputs: Inputs, *, alpha: float = 0.5, beta: float = 0.5) -> Array:
    base, a, b = inputs
    size = np.abs(a - base) ** (1 - alpha) * np.abs(b - base) ** alpha
    return np.asarray(base + np.copysign(size, (1 - beta) * (a - base) + beta * (b - base)))


def euclidean_add_difference(inputs: Inputs, *, alpha: float = 0.5) -> Array:
    base, a, b = inputs
    units = [delta / length(delta) if length(delta) else delta for delta in (a - base, b - base)]
    along = (1 - alpha) * (a - base) + alpha * (b - base)
    q = np.copysign(np.sqrt((1 - alpha) * units[0] ** 2 + alpha * units[1] ** 2), along)
    return np.asarray(base + length(along) * (q / length(q) if length(q) else q))


def similarity_add_difference(inputs: Inputs, *, alpha: float = 1.0, beta: float = 1.0) -> Array:
    base, a, b = inputs
    largest = np.maximum(np.abs(a), np.abs(b)) ** 2
    share = np.where(largest == 0, beta, beta * (over(a * b, largest) + 1) / 2)
    return np.asarray((1 - share) * (a + alpha * (b - base)) + share * ((1 - alpha / 2) * a + alpha / 2 * b))


def geometric_sum(inputs: Inputs, *, alpha: float = 0.5) -> Array:
    a, b = (values.astype(complex) for values in inputs)
    return np.asarray((a ** (1 - alpha) * b**alpha).real)


def multiply_quotient(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, a, b = inputs
    defined = (base != 0) & (a != 0) & (b != 0)
    base, first, b = (np.where(defined, values, 1.0) for values in inputs)
    logs = np.log(np.abs(first / base)), np.log(np.abs(b / base))
    largest = np.maximum(np.abs(logs[0]), np.abs(logs[1])) ** 2
    share = alpha * np.maximum(0, over(-logs[0] * logs[1], largest))
    return np.asarray(np.where(defined, (first * (b / base).astype(complex) ** share).real, a))


def max_(inputs: Inputs) -> Array:
    return np.asarray(np.max(np.stack(inputs), axis=0))


def clamp(inputs: Inputs, *, stiffness: float = 0.0) -> Array:
    first, bounds = inputs[0], np.stack(inputs[1:])
    low, high, mean = bounds.min(axis=0), bounds.max(axis=0), bounds.mean(axis=0)
    nearest_low = np.where(bounds <= mean, bounds, -np.inf).max(axis=0)
    nearest_high = np.where(bounds >= mean, bounds, np.inf).min(axis=0)
    nearest_low, nearest_high = np.maximum(nearest_low, low), np.minimum(nearest_high, high)
    return np.clip(
        first, (1 - stiffness) * low + stiffness * nearest_low, (1 - stiffness) * high + stiffness * nearest_high
    )


def tensor_sum(inputs: Inputs, *, width: float = 0.5, offset: float = 0.0, axis: int = 0) -> Array:
    """By walking from row to row; widths and offsets between 0 and 1."""
    first, second = inputs
    if first.ndim == 0:
        return second if width > 0.5 else first
    axis = axis if axis < first.ndim else 0
    count, end = first.shape[axis], offset + width
    rows = np.arange(count)
    if end <= 1:
        chosen = (rows >= round(offset * count)) & (rows < round(end * count))
    else:
        chosen = (rows >= round(offset * count)) | (rows < round((end - 1) * count))
    return np.asarray(np.where(chosen.reshape([-1 if i == axis else 1 for i in range(first.ndim)]), second, first))


def plus_random(inputs: Inputs, *, alpha: float, seed: int = 0, context: Context) -> Array:
    (values,) = inputs
    parts = []
    for block, start in enumerate(range(0, values.size, 2**17)):
        digest = hashlib.blake2b(repr((seed, context.name, 0, block)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        parts.append(torch.randn(min(2**17, values.size - start), generator=generator).double().numpy())
    return np.asarray(values + alpha * np.concatenate([*parts, np.zeros(0)]).reshape(values.shape))


def adjust(inputs: Inputs, **_: float) -> Array:
    """No tensor of the models that all methods are tried on is one that it changes."""
    return inputs[0]


def cosine(a: Array, b: Array) -> float:
    return float((a * b).sum()) / (length(a) * length(b)) if length(a) and length(b) else 0.0


def extract(inputs: Inputs, *, alpha: float = 0.5, beta: float = 0.25, gamma: float = 0.3) -> Array:
    def merge(vectors: Inputs) -> Array:
        base, a, b = vectors
        share = ((cosine(a - base, b - base) + 1) / 2) ** gamma
        mixed = (1 - alpha) * (a - base) + alpha * (b - base)
        return np.asarray(base + mixed * ((1 - beta) * share + beta * (1 - share)))

    return by_slices(merge, inputs)


def add_cosine_a(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    def merge(vectors: Inputs) -> Array:
        share = 1 - min(max(cosine(*vectors) - alpha, 0.0), 1.0)
        return (1 - share) * vectors[0] + share * vectors[1]

    return by_slices(merge, inputs, columns=True)


def add_cosine_b(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    whole = cosine(*inputs)

    def merge(vectors: Inputs) -> Array:
        share = 1 - min(max((cosine(*vectors) + whole) / 2 - alpha, 0.0), 1.0)
        return (1 - share) * vectors[0] + share * vectors[1]

    return by_slices(merge, inputs, columns=True)


DIFFUSION: Mapping[str, Any] = {
    function.__name__.rstrip("_"): function
    for function in (
        *(train_difference, add_opposite, add_strict_opposite, multiply_difference, euclidean_add_difference),
        *(similarity_add_difference, geometric_sum, multiply_quotient, max_, clamp),
        *(tensor_sum, plus_random, adjust, extract, add_cosine_a, add_cosine_b),
    )
}
