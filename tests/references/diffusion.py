"""References of the diffusion tools' methods: float64, whole tensors, written from the formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.references.sparse import half_words
from tests.references.spherical import Array, Inputs, by_slices, length

if TYPE_CHECKING:
    from tests.references.linear import Context


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
    halves = half_words(context.name, 0, values.size, seed)
    p = ((halves ^ np.uint64(1 << 31)).astype(np.float64) + 0.5) / 2**32
    return np.asarray(values + alpha * inverse_of_normal(p).reshape(values.shape))


def inverse_of_normal(p: Array) -> Array:
    """Algorithm AS 241, PPND7 (Wichura 1988), for p from 1e-10 on."""
    q = p - 0.5
    r = 0.180625 - q * q
    near = q * np.polyval([59.109374720, 159.29113202, 50.434271938, 3.3871327179], r)
    near /= np.polyval([67.187563600, 78.757757664, 17.895169469, 1.0], r)
    r = np.sqrt(-np.log(np.minimum(p, 1 - p))) - 1.6
    far = np.sign(q) * np.polyval([0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777], r)
    far /= np.polyval([0.12021132975, 0.73700164250, 1.0], r)
    return np.asarray(np.where(np.abs(q) <= 0.425, near, far))


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


def columns_of(values: Array) -> Array:
    """The columns along the first dimension, as rows; a vector is one."""
    return values.reshape(1, -1) if values.ndim < 2 else values.reshape(values.shape[0], -1).T


def column_cosines(a: Array, b: Array) -> Array:
    return (
        np.array([cosine(*pair) for pair in zip(columns_of(a), columns_of(b), strict=True)]) if a.size else np.zeros(0)
    )


def cosine_of_directions(a: Array, b: Array) -> float:
    """That of the tensors with every column scaled to the length 1."""
    if len(columns_of(a)) == 1:
        return cosine(a, b)
    units = [np.stack([over(c, np.full(c.shape, length(c))) for c in columns_of(values)]) for values in (a, b)]
    return cosine(*units)


def trimmed_range(cosines: Array) -> tuple[float, float]:
    kept = cosines[cosines >= np.percentile(cosines, 1, method="midpoint")]
    kept = kept[kept <= np.percentile(kept, 99, method="midpoint")]
    return float(kept.min()), float(kept.max())


def where_in(cosines: Array, low: float, high: float) -> Array:
    return (cosines - low) / (high - low) if high > low else (cosines >= low).astype(float)


def by_column(shares: Array, values: Array) -> Array:
    """Shaped to be spread over the tensor."""
    return shares.reshape((1, *values.shape[1:]) if values.ndim > 1 else ())


def mixed_by_cosine(inputs: Inputs, alpha: float, context: Context, scope: str, likeness: Any, whole: Any) -> Array:
    a, b = inputs
    if not a.size:
        return a
    pairs = context.everything.values() if scope == "model" else [inputs]
    low, high = trimmed_range(np.concatenate([likeness(*pair) for pair in pairs]))
    alike = (column_cosines(a, b) + whole(a, b)) / 2
    share = by_column(np.clip(where_in(alike, low, high) - alpha, 0, 1), a)
    return np.asarray(share * a + (1 - share) * b)


def cosine_a(inputs: Inputs, *, alpha: float = 0.5, scope: str = "model", context: Context) -> Array:
    return mixed_by_cosine(inputs, abs(alpha), context, scope, column_cosines, cosine_of_directions)


def cosine_b(inputs: Inputs, *, alpha: float = 0.5, scope: str = "model", context: Context) -> Array:
    def likeness(a: Array, b: Array) -> Array:
        return (column_cosines(a, b) + cosine(a, b)) / 2

    return mixed_by_cosine(inputs, alpha, context, scope, likeness, cosine)


def cosine_sum(inputs: Inputs, *, alpha: float = 0.5, inverse: bool = False, mean: bool = False) -> Array:
    *base, a, b = inputs
    if not a.size:
        return a
    alike = np.abs(column_cosines(a, b))
    share = np.clip(where_in(alike, *trimmed_range(alike)), 0, 1)
    share = 1 - share if inverse else share
    share = np.full(share.shape, share.mean()) if mean else share
    return np.asarray(a + alpha * by_column(share, a) * (b - (base[0] if base else a)))


def crossover(inputs: Inputs, *, alpha: float = 0.5, tilt: float = 0.0) -> Array:
    """Over all frequencies of a complex transform, each with its own share."""
    a, b = inputs
    if not a.size or alpha in (0, 1):
        return b if alpha == 1 else a
    if not a.ndim:
        return (1 - alpha) * a + alpha * b
    squares = np.zeros(a.shape)
    for axis, count in enumerate(a.shape):
        turns = np.minimum(np.arange(count), count - np.arange(count))
        shape = [-1 if i == axis else 1 for i in range(a.ndim)]
        squares = squares + (turns / max(count // 2, 1)).reshape(shape) ** 2
    frequency = np.sqrt(squares / a.ndim)
    share = {
        0: (frequency > 1 - alpha + 1e-6) * 1.0,
        1: np.full(a.shape, alpha),
        2: (frequency < alpha - 1e-6) * 1.0,
    }.get(int(tilt % 4) if tilt % 1 == 0 else -1)
    if share is None:
        turned, own = (tilt - 2, 1 - alpha) if tilt > 2 else (tilt, alpha)
        slope = 1 / np.tan(np.pi * turned / 2)
        share = np.clip(slope * (frequency - (1 - own if turned <= 1 else own)) + own, 0, 1)
        share = 1 - share if tilt > 2 else share
    return np.asarray(np.fft.ifftn((1 - share) * np.fft.fftn(a) + share * np.fft.fftn(b)).real)


def distribution_crossover(inputs: Inputs, *, alpha: float = 0.5, beta: float = 0.0) -> Array:
    base, a, b = inputs
    if not a.ndim:
        return alpha * a + (1 - alpha) * b
    if not a.size:
        return a
    order = np.argsort(base.reshape(-1), kind="stable")
    spectra = [np.fft.rfft(values.reshape(-1)[order]) for values in (a, b)]
    frequency = np.arange(spectra[0].size) / spectra[0].size
    share = np.clip((frequency - alpha) / beta + 0.5, 0, 1) if beta else (frequency >= alpha) * 1.0
    out = np.empty(a.size)
    out[order] = np.fft.irfft((1 - share) * spectra[0] + share * spectra[1], n=a.size)
    return out.reshape(a.shape)


def top_k_tensor_sum(inputs: Inputs, *, width: float = 0.5, offset: float = 0.0) -> Array:
    """Element by element; widths and offsets between 0 and 1."""
    a, b = (values.reshape(-1) for values in inputs)
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (np.abs(a), b)]
    end = width + offset
    inside = (
        (ranks[0] >= round(offset * a.size)) & (ranks[0] < round(end * a.size))
        if end <= 1
        else (ranks[0] < round((end - 1) * a.size)) | (ranks[0] >= round(offset * a.size))
    )
    from_a = np.argsort(a, kind="stable")[ranks[1]]  # the element of a that has the rank
    return np.asarray(np.where(inside[from_a], a[from_a], a).reshape(inputs[0].shape))


def reflected(values: Array, reach: int) -> Array:
    """With so many more at all ends."""
    for axis, count in enumerate(values.shape):
        index = np.arange(-reach, count + reach) % (2 * count)
        values = np.take(values, np.where(index < count, index, 2 * count - 1 - index), axis=axis)
    return values


def median_filtered(values: Array) -> Array:
    boxes = np.lib.stride_tricks.sliding_window_view(reflected(values, 1), (3,) * values.ndim)
    return np.asarray(np.median(boxes.reshape(*values.shape, -1), axis=-1))


def gaussian_filtered(values: Array) -> Array:
    kernel = np.exp(-(np.arange(-4.0, 5.0) ** 2) / 2)
    wide = reflected(values, 4)
    for axis in range(values.ndim):
        wide = np.apply_along_axis(np.convolve, axis, wide, kernel / kernel.sum(), "valid")
    return wide


def smooth_add(inputs: Inputs, *, alpha: float = 1.0) -> Array:
    base, a, b = inputs
    delta = b - base
    if delta.ndim and delta.size:
        delta = gaussian_filtered(median_filtered(delta))
    return np.asarray(a + alpha * delta)


DIFFUSION: Mapping[str, Any] = {
    function.__name__.rstrip("_"): function
    for function in (
        *(train_difference, add_opposite, add_strict_opposite, multiply_difference, euclidean_add_difference),
        *(similarity_add_difference, geometric_sum, multiply_quotient, max_, clamp),
        *(tensor_sum, plus_random, adjust, extract, add_cosine_a, add_cosine_b),
        *(cosine_a, cosine_b, cosine_sum, crossover, distribution_crossover, top_k_tensor_sum, smooth_add),
    )
}
