"""References of the methods on sparse task vectors: float64, whole tensors, written from the papers' formulas."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.references.linear import Context

Array = np.ndarray[Any, np.dtype[np.float64]]
Inputs = Sequence[Array]
Numbers = float | Sequence[float]


def each(value: Numbers, count: int) -> list[float]:
    return [float(value)] * count if isinstance(value, int | float) else list(value)


def deltas_of(inputs: Inputs) -> list[Array]:
    return [model - inputs[0] for model in inputs[1:]]


Words = np.ndarray[Any, np.dtype[np.uint64]]


def half_words(name: str, model: int, count: int, seed: int = 0) -> Words:
    """SplitMix64 (Steele, Lea, Flood 2014) from the digest of what names the numbers; of words the lower half first."""
    start, step = struct.unpack("<QQ", hashlib.blake2b(repr((seed, name, model)).encode(), digest_size=16).digest())
    step |= 1
    if (step ^ (step >> 1)).bit_count() < 24:
        step ^= 0xAAAAAAAAAAAAAAAA
    z = np.uint64(start) + np.uint64(step) * np.arange(1, count // 2 + 2, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return np.stack([z & np.uint64(0xFFFFFFFF), z >> np.uint64(32)], axis=1).reshape(-1)[:count]


def uniform(name: str, model: int, shape: tuple[int, ...], seed: int = 0) -> Array:
    """The random numbers of a tensor."""
    elements = int(np.prod(shape))
    return (half_words(name, model, elements, seed) >> np.uint64(8)).reshape(shape) / 2.0**24


def total(
    inputs: Inputs, deltas: Sequence[Array], weight: Numbers, *, normalize: bool, scale: float, elect: bool
) -> Array:
    """θ₀ + λ Σ mᵢ wᵢ dᵢ (/ Σ mᵢ wᵢ)"""
    weights = each(weight, len(deltas))
    votes = np.stack([share * delta for share, delta in zip(weights, deltas, strict=True)])
    agree = np.ones(votes.shape)
    if elect:
        agree = (np.sign(votes) == np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)) & (votes != 0)
    merged = (votes * agree).sum(axis=0)
    if normalize:
        divisor = np.tensordot(np.array(weights), agree.astype(float), axes=1)
        merged = merged / np.where(np.abs(divisor) < 1e-12, 1.0, divisor)
    return np.asarray(inputs[0] + scale * merged)


def l1_factor(whole: Array, kept: Array) -> float:
    left = np.abs(kept).sum()
    return float(np.abs(whole).sum() / left) if left > 0 else 1.0


def dare(
    inputs: Inputs,
    *,
    context: Context,
    elect: bool,
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    rescale_by: str = "density",
    seed: int = 0,
    **scale: float,
) -> Array:
    dropped = []
    for i, (delta, share) in enumerate(zip(deltas_of(inputs), each(density, len(inputs) - 1), strict=True)):
        kept = delta * (uniform(context.name, i, delta.shape, seed=seed) < share)
        if rescale:
            kept = kept * (l1_factor(delta, kept) if rescale_by == "l1" else 1 / share)
        dropped.append(kept)
    return total(inputs, dropped, weight, normalize=normalize, scale=scale.get("lambda", 1.0), elect=elect)


def dare_linear(inputs: Inputs, *, context: Context, **parameters: Any) -> Array:
    return dare(inputs, context=context, elect=False, **parameters)


def dare_ties(inputs: Inputs, *, context: Context, **parameters: Any) -> Array:
    return dare(inputs, context=context, elect=True, **parameters)


def band(delta: Array, density: float, gamma: float) -> Array:
    """Without the ⌊γn⌋ largest magnitudes, and of the others the ⌊density · n⌋ largest; of equal ones the first."""
    flat = delta.reshape(-1)
    n = flat.size
    count = min(max(int(density * n), 1), n) if density > 0 else 0
    outliers = min(int(gamma * n), n - count)
    order = np.argsort(-np.abs(flat).astype(np.float32), kind="stable")[outliers : outliers + count]
    kept = np.zeros_like(flat)
    kept[order] = flat[order]
    return kept.reshape(delta.shape)


def crumbs(
    inputs: Inputs,
    *,
    elect: bool,
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    gamma: Numbers = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    **scale: float,
) -> Array:
    count = len(inputs) - 1
    kept = []
    for delta, share, outliers in zip(deltas_of(inputs), each(density, count), each(gamma, count), strict=True):
        middle = band(delta, share, outliers)
        kept.append(middle * (l1_factor(delta, middle) if rescale else 1.0))
    return total(inputs, kept, weight, normalize=normalize, scale=scale.get("lambda", 1.0), elect=elect)


def breadcrumbs(inputs: Inputs, **parameters: Any) -> Array:
    return crumbs(inputs, elect=False, **parameters)


def breadcrumbs_ties(inputs: Inputs, **parameters: Any) -> Array:
    return crumbs(inputs, elect=True, **parameters)


def as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows along the last dimension; of convolutions the filters; a vector is one row."""
    elements = int(np.prod(shape))
    if len(shape) < 2:
        return 1, elements
    width = shape[-1] if len(shape) < 4 else elements // shape[0]
    return elements // width, width


def magprune(
    inputs: Inputs,
    *,
    context: Context,
    elect: bool,
    normalize: bool,
    weight: Numbers = 1.0,
    density: Numbers = 1.0,
    epsilon: Numbers = 0.15,
    rescale: bool = True,
    rescale_by: str = "l1",
    **scale: float,
) -> Array:
    if inputs[0].size == 0:
        return inputs[0]
    count = len(inputs) - 1
    height, width = as_rows(inputs[0].shape)
    dropped = []
    for i, (delta, share, spread) in enumerate(
        zip(deltas_of(inputs), each(density, count), each(epsilon, count), strict=True)
    ):
        rows = delta.reshape(height, width)
        kept = rows * share
        if 0 < share < 1:
            ranks = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
            chance = share - spread + 2 * spread * ranks / (width - 1) if width > 1 else np.full(rows.shape, share)
            kept = rows * (uniform(context.name, i, rows.shape) < chance)
            if rescale:
                kept = kept * l1_factor(rows, kept) if rescale_by == "l1" else kept / chance
        dropped.append(kept.reshape(delta.shape))
    return total(inputs, dropped, weight, normalize=normalize, scale=scale.get("lambda", 1.0), elect=elect)


def della(inputs: Inputs, *, context: Context, normalize: bool = True, **parameters: Any) -> Array:
    return magprune(inputs, context=context, elect=True, normalize=normalize, **parameters)


def della_linear(inputs: Inputs, *, context: Context, normalize: bool = False, **parameters: Any) -> Array:
    return magprune(inputs, context=context, elect=False, normalize=normalize, **parameters)


def sce(inputs: Inputs, *, select_topk: float = 1.0) -> Array:
    deltas = np.stack(deltas_of(inputs))
    if select_topk < 1 and deltas.size:
        varies = (deltas - deltas[0]).std(axis=0).astype(np.float32).reshape(-1)
        nonzero = int((varies != 0).sum())
        count = max(int(select_topk * nonzero), 1) if select_topk and nonzero else 0
        mask = np.zeros(varies.size)
        mask[np.argsort(-varies, kind="stable")[:count]] = 1.0
        deltas = deltas * mask.reshape(deltas.shape[1:])
    energy = np.array([(delta**2).sum() for delta in deltas])
    shares = energy / energy.sum() if energy.sum() else np.full(len(deltas), 1 / len(deltas))
    sign = np.where(deltas.sum(axis=0) >= 0, 1.0, -1.0)
    agree = (np.sign(deltas) == sign) & (deltas != 0)
    divisor = np.tensordot(shares, agree.astype(float), axes=1)
    merged = np.tensordot(shares, deltas * agree, axes=1) / np.where(divisor == 0, 1.0, divisor)
    return np.asarray(inputs[0] + merged)


def ram(inputs: Inputs, *, epsilon: float = 1e-5) -> Array:
    deltas = np.stack(deltas_of(inputs))
    changed = np.abs(deltas) > epsilon
    return np.asarray(inputs[0] + (deltas * changed).sum(axis=0) / np.maximum(changed.sum(axis=0), 1))


def ramplus_tl(inputs: Inputs, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Array:
    deltas = np.stack(deltas_of(inputs))
    changed = np.abs(deltas) > epsilon
    count = changed.sum(axis=0)
    merged = np.where(count > 1, (deltas * changed).sum(axis=0) / np.maximum(count, 1), 0.0)
    for delta, mask in zip(deltas, changed, strict=True):
        shared, own = (mask & (count > 1)).sum(), (mask & (count == 1)).sum()
        boost = 1 + r * min(max(shared / max(own, epsilon), 0.0), alpha)
        merged = merged + boost * delta * (mask & (count == 1))
    return np.asarray(inputs[0] + merged)


def magmax(inputs: Inputs, **scale: float) -> Array:
    deltas = np.stack(deltas_of(inputs))
    last = len(deltas) - 1 - np.argmax(np.abs(deltas)[::-1], axis=0)
    return np.asarray(inputs[0] + scale.get("lambda", 0.5) * np.take_along_axis(deltas, last[None], axis=0)[0])


def emr(inputs: Inputs, *, context: Context, task: int = 0) -> Array:
    def union(deltas: Array) -> tuple[Array, Array]:
        sign = np.where(deltas.sum(axis=0) > 0, 1.0, -1.0)
        agree = (deltas * sign > 0).astype(float)
        return sign * np.abs(deltas * agree).max(axis=0), agree

    own, agree = union(np.stack(deltas_of(inputs)))
    if not task:
        return np.asarray(inputs[0] + own)
    everything, agreed = union(np.stack([context.joined(number) for number in range(len(inputs) - 1)]))
    scale = np.abs(context.joined(task - 1)).sum() / np.abs(everything * agreed[task - 1]).sum()
    return np.asarray(inputs[0] + scale * agree[task - 1] * own)


def claims(deltas: Array, threshold: float) -> Array:
    return np.asarray(np.abs(deltas) > threshold * np.abs(deltas.sum(axis=0) - deltas))


def tall_mask(inputs: Inputs, *, task: int = 1, threshold: float = 0.6, **scale: float) -> Array:
    deltas = np.stack(deltas_of(inputs))
    return np.asarray(inputs[0] + scale.get("lambda", 1.0) * claims(deltas, threshold)[task - 1] * deltas.sum(axis=0))


def consensus_ta(inputs: Inputs, *, k: int = 2, threshold: float = 0.6, **scale: float) -> Array:
    deltas = np.stack(deltas_of(inputs))
    kept = claims(deltas, threshold).sum(axis=0) >= k
    return np.asarray(inputs[0] + scale.get("lambda", 1.0) * kept * deltas.sum(axis=0))


def minmax(values: Array, least: float, most: float) -> Array:
    clipped = np.clip(values, least, most)
    return (clipped - least) / (most - least) if most > least else np.zeros_like(values)


def pcb(inputs: Inputs, *, context: Context, ratio: float = 0.1, scope: str = "model", **scale: float) -> Array:
    count = len(inputs) - 1
    deltas = deltas_of(inputs) if scope == "tensor" else [context.joined(number) for number in range(count)]
    shape, flat = deltas[0].shape, [delta.reshape(-1) for delta in deltas]
    n = flat[0].size
    if n == 0:
        return inputs[0]
    joint = np.sum(flat, axis=0)
    values, weights = np.zeros(n), np.zeros(n)
    for delta in flat:
        size = np.abs(delta)
        ordered = np.sort(size)
        low, high = ordered[int(n * 1e-4)], ordered[max(int(n * (1 - 1e-4) - 1), 0)]
        high = max(low, high)
        score = np.exp(count * minmax(size, low, high) ** 2) * np.tanh(delta * joint)
        score = score.astype(np.float32).astype(np.float64)
        ranked = np.sort(score)
        share = minmax(score, ranked[min(int(n * (1 - ratio)), n - 1)], ranked[-1])
        values += np.sign(delta) * np.clip(size, low, high) * share
        weights += share
    merged = (values / np.maximum(weights, 1e-12)).reshape(shape)
    return np.asarray(
        inputs[0] + scale.get("lambda", 1.0) * (merged if scope == "tensor" else context.own_part(merged))
    )


def nearswap(inputs: Inputs, *, t: float) -> Array:
    base, model = inputs
    share = np.clip(t / np.maximum(np.abs(base - model), 1e-6), 0, 1)
    return np.asarray(share * model + (1 - share) * base)


def softmax(rows: Array) -> Array:
    raised = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def arcee_fusion(inputs: Inputs) -> Array:
    if inputs[0].size == 0:
        return inputs[0]
    base, model = (values.reshape(as_rows(values.shape)) for values in inputs)
    p, q = softmax(model) + 1e-8, softmax(base) + 1e-8
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    score = (np.abs(model - base) * divergence).astype(np.float32).astype(np.float64)
    ordered = np.sort(score.reshape(-1))
    low, median, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    merged = base + (model - base) * (score >= median + 1.5 * (high - low))
    return np.asarray(merged.reshape(inputs[0].shape))


def dropout(
    inputs: Inputs, *, context: Context, density: Numbers = 0.1, rescale: float = 1.0, seed: int = 0, **scale: float
) -> Array:
    densities = each(density, len(inputs) - 1)
    masks = [
        uniform(context.name, i, inputs[0].shape, seed=seed) < np.float32(share) for i, share in enumerate(densities)
    ]
    kept = [m * d / share**rescale for m, d, share in zip(masks, deltas_of(inputs), densities, strict=True)]
    return np.asarray(inputs[0] + scale.get("lambda", 1.0) * sum(kept) / np.maximum(np.sum(masks, axis=0), 1))


def trust_region(
    inputs: Inputs, *, context: Context, threshold_quantile: float = 0.99, scope: str = "model", **scale: float
) -> Array:
    deltas = [context.joined(i) if scope == "model" else d.reshape(-1) for i, d in enumerate(deltas_of(inputs))]
    pairs = [np.abs(a * b) for i, a in enumerate(deltas) for b in deltas[:i]]
    conflict = np.sqrt(np.sum(pairs, axis=0)).astype(np.float32)
    dropped = int((1 - threshold_quantile) * conflict.size)
    threshold = np.sort(conflict)[::-1][dropped - 1] if dropped else np.inf
    inside = ((conflict < threshold) | (conflict == 0)).astype(np.float64)
    inside = context.own_part(inside) if scope == "model" else inside.reshape(inputs[0].shape)
    return np.asarray(inputs[0] + scale.get("lambda", 1.0) * inside * np.sum(deltas_of(inputs), axis=0))


SPARSE: Mapping[str, Any] = {
    function.__name__: function
    for function in (
        *(dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, della, della_linear),
        *(sce, ram, ramplus_tl, magmax, emr, tall_mask, consensus_ta, pcb, nearswap, arcee_fusion),
        *(dropout, trust_region),
    )
}
"""The references by method."""
