"""Methods that take one model's change where it matters, or where it is small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from streammerge.methods.contract import Between, ParameterValue
from streammerge.methods.cuts import Cut
from streammerge.methods.place import Target
from streammerge.methods.ranking import Ranking
from streammerge.methods.registry import BlockMethod, method

if TYPE_CHECKING:
    from torch import Tensor


@method(BlockMethod, base="required", models=(1, 1), temporaries=2)
def nearswap(base: Tensor, model: Tensor, *, t: Annotated[float, Between(0)]) -> Tensor:
    """θ = θ₀ + g (θ₁ − θ₀),   g = min(t / |θ₁ − θ₀|, 1)

    NearSwap, alchemonaut 2024: changes of up to t are taken, larger ones are cut to t. As in mergekit, which divides by
    1e-6 at the least.
    """
    delta = model - base
    share = delta.abs().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(max=1.0)
    return delta.mul_(share).add_(base)


def importance(block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """|θ₁ − θ₀| times the divergence of the rows' softmax, rounded to float32."""
    base, model = inputs
    p = model.double().softmax(1).add_(1e-8)
    q = base.double().softmax(1).add_(1e-8)
    divergence = (p.div(q).log_().mul_(p)).sum(1, keepdim=True)
    return [(model - base).abs().double().mul_(divergence).float()]


def fusion_threshold(target: Target, parameters: Mapping[str, ParameterValue]) -> Any:  # noqa: ANN401
    """The median of the importance, and its quartiles' distance one and a half times."""
    last = target.elements - 1
    ranks = [target.elements - int(share * last) for share in (0.25, 0.5, 0.75)]

    def threshold(cuts: Sequence[Sequence[Cut]]) -> float:
        low, median, high = (cut.value for cut in cuts[0])
        return median + 1.5 * (high - low)

    return Ranking(target.elements, [ranks], importance, signed=True, exact=False, gather=False, then=threshold).begin(
        1
    )


@method(
    BlockMethod,
    base="required",
    models=(1, 1),
    statistics=fusion_threshold,
    passes=2,
    rows="rows",
    temporaries=20,
    float64=True,
)
def arcee_fusion(base: Tensor, model: Tensor, *, statistics: float) -> Tensor:
    """θ = θ₀ + [s ≥ Q₂ + 1.5 (Q₃ − Q₁)] (θ₁ − θ₀),   s = |θ₁ − θ₀| · KL(softmax θ₁ ‖ softmax θ₀) of the row

    Arcee Fusion, as in mergekit, but with the exact quartiles Q of s over the tensor: mergekit takes those of a random
    sample where there are more than a million elements. Of convolutions a row is a filter, and vectors are one row.
    """
    (score,) = importance(0, (base, model))
    return (model - base).mul_(score.double() >= statistics).add_(base)
