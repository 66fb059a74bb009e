"""Methods on sparse task vectors: some elements of each θᵢ − θ₀ are dropped before they are added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from streammerge.methods.contract import ParameterValue, PerModel, Share
from streammerge.methods.registry import BlockMethod, method
from streammerge.methods.trimming import Trim, search_k_largest

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target


def trim_to_density(target: Target, parameters: Mapping[str, ParameterValue]) -> Any:  # noqa: ANN401
    """Find the `density` largest elements of every task vector."""
    density = parameters["density"]
    assert isinstance(density, tuple)
    return search_k_largest(target.elements, density, rescale=bool(parameters["rescale"]))


@method(
    BlockMethod,
    base="required",
    accepted=("int8_mask",),
    statistics=trim_to_density,
    passes=3,
    scope="scope",
    statistics_of=("density", "rescale"),
)
def ties(
    base: Tensor,
    *models: Tensor,
    weight: PerModel = (1.0,),
    density: Sequence[Share] = (1.0,),
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: bool = False,
    scope: Literal["tensor", "model"] = "tensor",
    place: Place,
    statistics: Sequence[Trim],
) -> Tensor:
    """θ = θ₀ + λ Σᵢ mᵢ wᵢ trim(θᵢ − θ₀), divided by Σᵢ mᵢ wᵢ if `normalize`; mᵢ: agrees with the elected sign.

    TIES-Merging, Yadav et al. 2023, arXiv:2306.01708. trim keeps the `density` largest elements (of equal ones the
    first) of each tensor as in mergekit, or with `scope: model` of the whole model as in the paper; the sign of the
    weighted sum is elected, + where it is zero. `rescale` scales what was kept to the L1 norm of the whole task vector.
    """
    total, weights = elect_and_sum(
        [
            trim.apply(model - base, place.counted).mul_(w)
            for model, trim, w in zip(models, statistics, weight, strict=True)
        ],
        weight,
    )
    if normalize:
        total /= weights.masked_fill_(weights == 0, 1.0)
    return total.mul_(lambda_).add_(base)


def elect_and_sum(deltas: Sequence[Tensor], weight: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The sum of the weighted deltas that agree with the sign of their sum, and the sum of their weights."""
    elected = sum(deltas[1:], start=deltas[0]) >= 0
    total, weights = deltas[0].new_zeros(deltas[0].shape), deltas[0].new_zeros(deltas[0].shape)
    for delta, share in zip(deltas, weight, strict=True):
        agrees = ((delta > 0) & elected) | ((delta < 0) & ~elected)
        total += delta * agrees
        weights += agrees.to(weights.dtype) * share  # a flag times a number would be rounded to float32
    return total, weights
