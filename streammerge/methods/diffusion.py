"""Methods of the diffusion tools that look at one element of each model at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from streammerge.methods.contract import ParameterValue, Share
from streammerge.methods.registry import BlockMethod, Statistics, method
from streammerge.methods.statistics.gram import Gram, GramPass

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Target


@method(BlockMethod, base="required", models=(2, 2), elementwise=True)
def train_difference(base: Tensor, first: Tensor, second: Tensor, *, alpha: float = 1.0) -> Tensor:
    """θ = θ₁ + 1.8 α s (θ₂ − θ₀),   s = |θ₂ − θ₁| / (|θ₂ − θ₁| + |θ₂ − θ₀|)

    SuperMerger's train difference: adds a fine-tune where θ₁ is not there yet. s is 0 where all three are equal.
    """
    delta, missing = second - base, (second - first).abs_()
    share = quotient(missing, missing + delta.abs())
    return share.mul_(1.8 * alpha).mul_(delta).add_(first)


@method(BlockMethod, base="required", models=(2, 2), elementwise=True)
def add_opposite(base: Tensor, first: Tensor, second: Tensor, *, alpha: float = 1.0) -> Tensor:
    """θ = θ₁ + 2 α s (θ₂ − θ₀),   s = |θ₁ − θ₂| / (|θ₁ − θ₂| + |θ₁ + θ₂ − 2 θ₀|)

    sd-mecha's add opposite: adds a fine-tune where it moves against the first. s is 0 where all three are equal.
    """
    one, other = first - base, second - base
    apart = (one - other).abs_()
    share = quotient(apart, apart + (one + other).abs_())
    return share.mul_(2.0 * alpha).mul_(other).add_(first)


@method(BlockMethod, base="required", models=(2, 2), elementwise=True)
def add_strict_opposite(base: Tensor, first: Tensor, second: Tensor, *, alpha: float = 1.0) -> Tensor:
    """θ = θ₁ + 2 α s (θ₂ − θ₀),   s = max(0, −δ₁ δ₂) / max(|δ₁|, |δ₂|)²,   δᵢ = θᵢ − θ₀

    sd-mecha's add strict opposite: adds a fine-tune only where its sign is not the first's. s is 0 where both are θ₀.
    """
    one, other = first - base, second - base
    share = ratio_of_magnitudes(one, other).mul_(opposite_signs(one, other))
    return share.mul_(2.0 * alpha).mul_(other).add_(first)


@method(BlockMethod, base="required", models=(2, 2))
def multiply_difference(
    base: Tensor, first: Tensor, second: Tensor, *, alpha: Share = 0.5, beta: float = 0.5
) -> Tensor:
    """θ = θ₀ ± |δ₁|¹⁻ᵅ |δ₂|ᵅ with the sign of (1 − β) δ₁ + β δ₂,   δᵢ = θᵢ − θ₀

    sd-meh's multiply difference: the task vectors' geometric mean. The sign is + where the sum is zero.
    """
    import torch

    one, other = first - base, second - base
    size = one.abs().pow_(1.0 - alpha).mul_(other.abs().pow_(alpha))
    return torch.copysign(size, one.mul_(1.0 - beta).add_(other, alpha=beta)).add_(base)


def gram_of_tasks(target: Target, parameters: Mapping[str, ParameterValue]) -> GramPass:
    """Measure the inner products of the task vectors."""
    return GramPass(target.inputs, tasks=True)


@method(BlockMethod, base="required", models=(2, 2), statistics=Statistics(gram_of_tasks, passes=1))
def euclidean_add_difference(
    base: Tensor, first: Tensor, second: Tensor, *, alpha: Share = 0.5, statistics: Gram
) -> Tensor:
    """θ = θ₀ + ‖S‖ q / ‖q‖,   q² = (1 − α) δ₁²/‖δ₁‖² + α δ₂²/‖δ₂‖² with the sign of S = (1 − α) δ₁ + α δ₂

    sd-meh's euclidean add difference: task vectors added by their squares, with the length of their weighted sum. The
    sign is + where S is zero; a task vector that is zero has no part in q.
    """
    import torch

    tasks = statistics.defined().task_vectors()
    weights = [
        weight / tasks.values[i][i] if tasks.values[i][i] else 0.0 for i, weight in enumerate((1.0 - alpha, alpha))
    ]
    square = sum(weight * tasks.values[i][i] for i, weight in enumerate(weights))  # of ‖q‖: 1, or less beside zeros
    length = tasks.length([1.0 - alpha, alpha]) / math.sqrt(square) if square else 0.0
    one, other = first - base, second - base
    along = (one * (1.0 - alpha)).add_(other, alpha=alpha)
    # scaled before they are squared, lest float32 lose them
    size = torch.hypot(one.mul_(length * math.sqrt(weights[0])), other.mul_(length * math.sqrt(weights[1])))
    return torch.copysign(size, along).add_(base)


@method(BlockMethod, base="required", models=(2, 2), elementwise=True)
def similarity_add_difference(
    base: Tensor, first: Tensor, second: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """θ = (1 − s) (θ₁ + α (θ₂ − θ₀)) + s (θ₁ + α/2 (θ₂ − θ₁)),   s = β (θ₁ θ₂ / max(|θ₁|, |θ₂|)² + 1) / 2

    sd-meh's similarity add difference: adds where the models differ, averages where they are alike. s is β where both
    are zero.
    """
    alike = ratio_of_magnitudes(first, second).mul_(first.sign()).mul_(second.sign())
    alike.masked_fill_((first == 0) & (second == 0), 1.0)
    share = alike.add_(1.0).mul_(0.5 * beta)
    added = (second - base).mul_(alpha)
    averaged = (second - first).mul_(0.5 * alpha)
    return averaged.sub_(added).mul_(share).add_(added).add_(first)


@method(BlockMethod, models=(2, 2))
def geometric_sum(first: Tensor, second: Tensor, *, alpha: Share = 0.5) -> Tensor:
    """θ = Re(θ₁¹⁻ᵅ θ₂ᵅ), the principal powers of complex numbers

    sd-mecha's geometric sum (Chattiori's GEO has no value for negative numbers). Zero to the power of 0 is 1.
    """
    import torch

    size = first.abs().pow_(1.0 - alpha).mul_(second.abs().pow_(alpha))
    if_first, if_second = first < 0, second < 0
    both = torch.where(if_second, -size, size * turned(1.0 - alpha))  # Re((−1)¹⁻ᵅ (−1)ᵅ) is −1
    return torch.where(if_first, both, torch.where(if_second, size * turned(alpha), size))


def turned(share: float) -> float:
    """cos(π share), exact for 0, ½ and 1."""
    return 0.0 if share == 0.5 else math.cos(math.pi * share)


@method(BlockMethod, base="required", models=(2, 2))
def multiply_quotient(base: Tensor, first: Tensor, second: Tensor, *, alpha: float = 1.0) -> Tensor:
    """θ = Re(θ₁ (θ₂/θ₀)^(α s)),   s = max(0, −l₁ l₂) / max(|l₁|, |l₂|)²,   lᵢ = ln |θᵢ/θ₀|

    sd-mecha's multiply quotient: multiplies by a fine-tune's factor where the first's is the inverse. θ is θ₁ where one
    of the three is zero, or both quotients are ±1.
    """
    import torch

    one, other = log_quotient(first, base), log_quotient(second, base)
    exponent = ratio_of_magnitudes(one, other).mul_(opposite_signs(one, other)).mul_(alpha)
    factor = torch.exp(other.mul_(exponent))
    factor.mul_(torch.where((second < 0) != (base < 0), torch.cos(exponent * math.pi), 1.0))
    defined = (first != 0) & (second != 0) & (base != 0)
    return torch.where(defined, factor.mul_(first), first)


@method(BlockMethod, elementwise=True)
def max_(*models: Tensor) -> Tensor:
    """θ = max(θ₁, …, θₙ)

    Chattiori's MAX, for any number of models: the greatest of each element, not the one of the greatest magnitude.
    """
    greatest = models[0].clone()
    for model in models[1:]:
        greatest = model.where((model > greatest) | (model != model), greatest)  # of equal zeros the first
    return greatest


@method(BlockMethod, models=(2, None))
def clamp(first: Tensor, *bounds: Tensor, stiffness: Share = 0.0) -> Tensor:
    """θ = min(max(θ₁, l), h),   l and h: the least and the greatest of θ₂, …, θₙ

    sd-mecha's clamp, and sd-meh's weights clip for a nested merge and the models it was made of. `stiffness` moves l
    and h to the greatest bound that is at most their mean, and to the least that is at least their mean.
    """
    import torch

    least, greatest, mean = bounds[0].clone(), bounds[0].clone(), bounds[0].clone()
    for bound in bounds[1:]:
        torch.minimum(least, bound, out=least)
        torch.maximum(greatest, bound, out=greatest)
        mean += bound
    if stiffness:
        mean /= len(bounds)
        low, high = least.clone(), greatest.clone()
        for bound in bounds:
            low = torch.where(bound <= mean, torch.maximum(low, bound), low)
            high = torch.where(bound >= mean, torch.minimum(high, bound), high)
        least.lerp_(low, stiffness)
        greatest.lerp_(high, stiffness)
    return torch.clamp(first, least, greatest)


def quotient(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where both are 0."""
    return part / whole.masked_fill_(whole == 0, 1.0)


def ratio_of_magnitudes(one: Tensor, other: Tensor) -> Tensor:
    """min(|a|, |b|) / max(|a|, |b|), which is |a b| / max(|a|, |b|)² without its overflow; 0 where both are 0."""
    size, other_size = one.abs(), other.abs()
    return quotient(size.minimum(other_size), size.maximum(other_size))


def opposite_signs(one: Tensor, other: Tensor) -> Tensor:
    """Where one is positive and the other negative."""
    return ((one > 0) & (other < 0)) | ((one < 0) & (other > 0))


def log_quotient(value: Tensor, base: Tensor) -> Tensor:
    """ln |value / base|, exact for near ones; 0 where one of them is zero."""
    import torch

    size = base.abs()
    nothing = (value == 0) | (base == 0)
    size.masked_fill_(nothing, 1.0)
    relative = value.abs().masked_fill_(nothing, 1.0).sub_(size).div_(size)
    far = value.abs().masked_fill_(nothing, 1.0).div_(size).log_()
    return torch.where(relative.abs() < 0.5, relative.log1p(), far)
