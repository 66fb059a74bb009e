"""Linear methods: one coefficient per input, from the parameters alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streammerge.errors import MethodError
from streammerge.methods.contract import ParameterValue, PerModel
from streammerge.methods.registry import LinearMethod, Quotient, method
from streammerge.methods.results import net


@method(LinearMethod)
def linear(*, weight: PerModel = (1.0,), normalize: bool = True) -> Quotient:
    """θ = Σᵢ wᵢ θᵢ, divided by Σᵢ wᵢ unless `normalize` is false.

    Model soups, Wortsman et al. 2022, arXiv:2203.05482.
    """
    return mean(weight) if normalize else Quotient(weight)


@method(LinearMethod, models=(2, 2))
def weighted_sum(*, alpha: float = 0.5) -> list[float]:
    """θ = (1 − α) θ₁ + α θ₂

    The checkpoint mergers' "weighted sum" with multiplier α.
    """
    return [net(1.0, -alpha), alpha]


@method(LinearMethod, base="required", models=(2, 2))
def add_difference(*, alpha: float = 1.0) -> list[float]:
    """θ = θ₁ + α (θ₂ − θ₀)

    The checkpoint mergers' "add difference": A + α (B − C) with C as the base.
    """
    return [-alpha, 1.0, alpha]


@method(LinearMethod, base="required")
def task_arithmetic(*, weight: PerModel = (1.0,), lambda_: float = 1.0, normalize: bool = False) -> Quotient:
    """θ = θ₀ + λ Σᵢ wᵢ (θᵢ − θ₀), the weights divided by Σᵢ wᵢ if `normalize` is true.

    Task arithmetic, Ilharco et al. 2023, arXiv:2212.04089.
    """
    found = mean(weight) if normalize else Quotient(weight)
    scaled = [lambda_ * share for share in found.coefficients]
    return Quotient([net(found.divisor, *(-share for share in scaled)), *scaled], found.divisor)


@method(LinearMethod, models=(1, 1))
def passthrough(*, scale: PerModel = (1.0,)) -> list[float]:
    """θ = s θ₁, the model itself where s is 1.

    mergekit's passthrough; `scale` is the model's own, and may be conditional on the tensor's name.
    """
    return list(scale)


@method(LinearMethod, models=(1, 1))
def scale(*, alpha: PerModel) -> list[float]:
    """θ = α θ₁

    One model scaled by a number that has to be given.
    """
    return list(alpha)


@method(LinearMethod)
def n_average(*, weight: PerModel = (1.0,)) -> Quotient:
    """θ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ, the mean of all models where no weights are given.

    sd-mecha's n_average: `linear` that is always normalised.
    """
    return mean(weight)


@method(LinearMethod, models=(3, 3))
def sum_twice(*, alpha: float = 0.5, beta: float = 0.25) -> list[float]:
    """θ = (1 − β) ((1 − α) θ₁ + α θ₂) + β θ₃

    SuperMerger's and sd-meh's sum twice: one weighted sum after the other.
    """
    return [(1.0 - beta) * (1.0 - alpha), (1.0 - beta) * alpha, beta]


@method(LinearMethod, models=(3, 3))
def triple_sum(*, alpha: float = 0.5, beta: float = 0.25) -> list[float]:
    """θ = (1 − α − β) θ₁ + α θ₂ + β θ₃

    SuperMerger's and sd-meh's triple sum.
    """
    return [net(1.0, -alpha, -beta), alpha, beta]


@method(LinearMethod, base="required")
def expo(*, alpha: float = 0.1, weight: PerModel = (1.0,)) -> Quotient:
    """θ = θ̄ + α (θ̄ − θ₀),   θ̄ = Σᵢ wᵢ θᵢ / Σᵢ wᵢ

    Model extrapolation (ExPO), Zheng et al. 2024, arXiv:2404.16792: the base is the model before alignment.
    """
    found = mean(weight)
    models = ((1.0 + alpha) * share for share in found.coefficients)
    return Quotient([-alpha * found.divisor, *models], found.divisor)


@method(LinearMethod, models=(2, 2))
def weighted_subtraction(*, alpha: float = 0.5, beta: float = 0.25) -> Quotient:
    """θ = (θ₁ − αβ θ₂) / (1 − αβ)

    sd-meh's weighted subtraction, what takes θ₂ out of a weighted sum. Where αβ is 1 there is no such model, and it is
    refused; sd-meh nudges β by 1e-10 if both are 1, and multiplies the noise by 1e10.
    """
    rest = net(1.0, -alpha * beta)
    if rest == 0:
        raise MethodError(
            f"weighted_subtraction divides by 1 - alpha * beta, which is zero for alpha {alpha:g} and beta {beta:g}",
            advice="Choose an alpha or a beta that is not 1.",
        )
    return Quotient([1.0, -alpha * beta], rest)


@method(LinearMethod, models=(2, 2))
def add(*, scale: float = 1.0) -> list[float]:
    """θ = θ₁ + s θ₂

    ComfyUI's ModelMergeAdd (s = 1): adds a model that is a difference, such as `subtract` makes.
    """
    return [1.0, scale]


@method(LinearMethod, models=(2, 2))
def subtract(*, scale: float = 1.0) -> list[float]:
    """θ = s (θ₁ − θ₂)

    ComfyUI's ModelMergeSubtract with multiplier s, and sd-mecha's subtract.
    """
    return [scale, -scale]


@method(LinearMethod, models=(2, 2))
def sigmoid(*, alpha: float) -> list[float]:
    """θ = σ(4α) (θ₁ + θ₂) − σ(α) θ₁,   σ(x) = 1 / (1 + e⁻ˣ)

    Chattiori's sigmoid mode (SIG). Its coefficients add up to 1 near α = 1/3 and for large α only.
    """
    both = logistic(4.0 * alpha)
    return [net(both, -logistic(alpha)), both]


def logistic(x: float) -> float:
    """1 / (1 + e⁻ˣ), for every finite x."""
    small = math.exp(-abs(x))
    return 1.0 / (1.0 + small) if x >= 0 else small / (1.0 + small)


def normalized(weight: PerModel) -> list[float]:
    """The weights divided by their sum; MethodError where that is zero."""
    found = mean(weight)
    return [share / found.divisor for share in found.coefficients]


def mean(weight: PerModel) -> Quotient:
    """The weights and their sum, or ones and their number where all are equal; MethodError where the sum is zero."""
    total = net(*weight)
    if total == 0:
        raise MethodError(
            f"the weights {list(weight)} sum to zero and can't be normalised",
            advice="Choose weights whose sum is not zero.",
        )
    if len(set(weight)) == 1:
        return Quotient([1.0] * len(weight), float(len(weight)))
    return Quotient(weight, total)


def check_weights(parameters: Mapping[str, ParameterValue], inputs: int) -> None:
    """MethodError where weights sum to zero by whose sum, or by parts of it, something is divided."""
    weight: Any = parameters["weight"]
    if parameters.get("normalize", parameters.get("normalize_weights", True)):
        mean(weight)
