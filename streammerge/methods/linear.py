"""Linear methods: one coefficient per input, from the parameters alone."""

from __future__ import annotations

from streammerge.errors import MethodError
from streammerge.methods.contract import PerModel
from streammerge.methods.registry import LinearMethod, method, net

GTA_UNUSED = ("density", "int8_mask", "rescale")
"""Parameters that mergekit's schema lets task arithmetic take, without effect."""


@method(LinearMethod)
def linear(*, weight: PerModel = (1.0,), normalize: bool = True) -> list[float]:
    """θ = Σᵢ wᵢ θᵢ, divided by Σᵢ wᵢ unless `normalize` is false.

    Model soups, Wortsman et al. 2022, arXiv:2203.05482.
    """
    return normalized(weight) if normalize else list(weight)


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


@method(LinearMethod, base="required", accepted=GTA_UNUSED)
def task_arithmetic(*, weight: PerModel = (1.0,), lambda_: float = 1.0, normalize: bool = False) -> list[float]:
    """θ = θ₀ + λ Σᵢ wᵢ (θᵢ − θ₀), the weights divided by Σᵢ wᵢ if `normalize` is true.

    Task arithmetic, Ilharco et al. 2023, arXiv:2212.04089.
    """
    scaled = [lambda_ * share for share in (normalized(weight) if normalize else weight)]
    return [net(1.0, *(-share for share in scaled)), *scaled]


@method(LinearMethod, models=(1, 1))
def passthrough(*, scale: float = 1.0) -> list[float]:
    """θ = s θ₁, the model itself where s is 1.

    mergekit's passthrough; `scale` may be conditional on the tensor's name.
    """
    return [scale]


@method(LinearMethod, models=(1, 1))
def scale(*, alpha: float) -> list[float]:
    """θ = α θ₁

    One model scaled by a number that has to be given.
    """
    return [alpha]


def normalized(weight: PerModel) -> list[float]:
    """The weights divided by their sum; MethodError where that is zero."""
    total = net(*weight)
    if total == 0:
        raise MethodError(
            f"the weights {list(weight)} sum to zero and can't be normalised",
            advice="Choose other weights, or set normalize to false.",
        )
    return [share / total for share in weight]
