"""Methods that take one model's change where it matters, or where it is small."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final

from streammerge.methods.contract import Between, ParameterValue
from streammerge.methods.registry import BlockMethod, method
from streammerge.methods.statistics.ranking import Ranking
from streammerge.methods.statistics.ranks import Cut
from streammerge.methods.statistics.slices import Slicing

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods.place import Place, Target


@method(BlockMethod, base="required", models=(1, 1), temporaries=2)
def nearswap(base: Tensor, model: Tensor, *, t: Annotated[float, Between(0)]) -> Tensor:
    """θ = θ₀ + g (θ₁ − θ₀),   g = min(t / |θ₁ − θ₀|, 1)

    NearSwap, alchemonaut 2024: changes of up to t are taken, larger ones are cut to t. As in mergekit, which divides by
    1e-6 at the least.
    """
    delta = model - base
    share = delta.abs().clamp_(min=1e-6).reciprocal_().mul_(t).clamp_(max=1.0)
    return delta.mul_(share).add_(base)


SOFTMAX_ELEMENTS: Final = 2**14
"""Elements of whole rows whose softmax is taken at once: in float64, several times over."""


def divergences(base: Tensor, model: Tensor) -> Tensor:
    """KL(softmax θ₁ ‖ softmax θ₀) of every row of two matrices, in float64."""
    import torch

    step = max(SOFTMAX_ELEMENTS // base.shape[1], 1)
    parts = [slice(first, first + step) for first in range(0, len(base), step)]
    return torch.cat([_divergences(base[rows], model[rows]) for rows in parts])


def _divergences(base: Tensor, model: Tensor) -> Tensor:
    p = model.double().softmax(1).add_(1e-8)
    q = base.double().softmax(1).add_(1e-8)
    return p.div(q).log_().mul_(p).sum(1)


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """|θ₁ − θ₀| times the divergence of the row, rounded to float32, of all rows of a tensor; `threshold` is the least
    that is taken."""

    target: Target
    divergences: Tensor
    threshold: float = math.inf

    def of_block(self, block: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The scores of the block's elements."""
        base, model = inputs
        rows = self.rows(block, len(base)).to(base.device)
        return [(model - base).abs_().double().mul_(rows[:, None]).float()]

    def rows(self, block: int, count: int) -> Tensor:
        """The divergences of the rows of a block that has so many."""
        first = block * self.target.step // Slicing.of(self.target.shape, "rows").width
        return self.divergences[first : first + count]

    def ranking(self) -> Ranking:
        """Take what is above the median by one and a half times the quartiles' distance."""
        elements = self.target.elements
        ranks = [elements - int(share * (elements - 1)) for share in (0.25, 0.5, 0.75)]

        def chosen(cuts: Sequence[Sequence[Cut]]) -> RowScores:
            low, median, high = (cut.value for cut in cuts[0])
            return replace(self, threshold=median + 1.5 * (high - low))

        return Ranking(elements, [ranks], self.of_block, signed=True, exact=False, gather=False, then=chosen)


class DivergencePass:
    """The pass that measures the divergence of every row; then the scores are ranked."""

    ordered = False

    def __init__(self, target: Target) -> None:
        import torch

        count = Slicing.of(target.shape, "rows").count
        self.scores = RowScores(target, torch.zeros(count, dtype=torch.float64))

    def measure(self, block: int, inputs: Sequence[Tensor]) -> Tensor:
        """The divergences of the block's rows."""
        return divergences(*inputs).cpu()

    def add(self, block: int, measured: Tensor) -> None:
        """Keep them."""
        self.scores.rows(block, len(measured)).copy_(measured)

    def finish(self) -> Any:  # noqa: ANN401  (another pass)
        """The passes that find the scores' quartiles."""
        return self.scores.ranking().begin(1)


def begin_fusion(target: Target, parameters: Mapping[str, ParameterValue]) -> Any:  # noqa: ANN401
    """Measure the rows' divergences, then the scores; nothing of an empty tensor."""
    return DivergencePass(target) if target.elements else None


def held_by_rows(target: Target, parameters: Mapping[str, ParameterValue]) -> int:
    """One divergence for each row, in float64."""
    return 8 * Slicing.of(target.shape, "rows").count


@method(
    BlockMethod,
    base="required",
    models=(1, 1),
    statistics=begin_fusion,
    passes=3,
    rows="rows",
    held=held_by_rows,
    temporaries=20,  # measured, as those of breadcrumbs are: two workers have no room
    float64=True,
)
def arcee_fusion(base: Tensor, model: Tensor, *, place: Place, statistics: RowScores) -> Tensor:
    """θ = θ₀ + [s ≥ Q₂ + 1.5 (Q₃ − Q₁)] (θ₁ − θ₀),   s = |θ₁ − θ₀| · KL(softmax θ₁ ‖ softmax θ₀) of the row

    Arcee Fusion, as in mergekit, but with the exact quartiles Q of s over the tensor: mergekit takes those of a random
    sample where there are more than a million elements. Of convolutions a row is a filter, and vectors are one row.
    """
    (score,) = statistics.of_block(place.block, (base, model))
    return (model - base).mul_(score.double() >= statistics.threshold).add_(base)
